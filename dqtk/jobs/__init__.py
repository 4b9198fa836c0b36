"""Batch jobs: models x recipes x prompts x seeds x metrics, in four resumable stages (generate, features, reduce, report).

Every stage reads files and writes files; a process that dies leaves whole files or none, and whatever exists and still fits is
not made again. Work is cut into batches by the job alone, never by the number of processes, and each process takes every n-th
batch: the same pictures and the same numbers come out of 1 and of 3 processes. Processes meet only between stages.
"""
