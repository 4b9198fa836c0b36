"""Families: one file each, an ``ADAPTER`` and what the family's pipelines need. Imported lazily; imports no model library."""
