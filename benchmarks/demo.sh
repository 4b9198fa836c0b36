#!/bin/sh
# make demo: the commands a user would type, on the embedded pipelines.
set -eu
run() { printf '\n$ %s\n' "$*"; "$@"; }
prompts=pipelines/tiny/prompts.txt
rm -rf out/pixart-w4a8 out/sdxl-w8a8 out/report-records out/report.html out/report-sdxl-records out/report-sdxl.html

run dqtk explain tiny-pixart --recipe w4a8
run dqtk quantize tiny-pixart --recipe w4a8 --prompts pipelines/tiny/calibration.txt --num-prompts 16 --output out/pixart-w4a8
run dqtk compare tiny-pixart out/pixart-w4a8 --prompts $prompts --num-prompts 24 --output out/report.html

run dqtk explain tiny-sdxl --recipe w8a8 --roles
run dqtk quantize tiny-sdxl --recipe w8a8 --output out/sdxl-w8a8
run dqtk compare tiny-sdxl out/sdxl-w8a8 --prompts $prompts --num-prompts 24 --output out/report-sdxl.html

printf '\nOpen out/report.html and out/report-sdxl.html in a browser.\n'
