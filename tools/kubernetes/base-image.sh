#!/bin/bash
# base-image.sh FOLDER: the root file system of a stand-in for the image python:3.11-slim-bookworm,
# from Debian's own packages. Like it, it has `python3` in /usr/local/bin and little else.
set -euo pipefail
root=$1
# python3-distutils: debootstrap does not find what provides the name that python3.11-venv asks for.
packages=ca-certificates,netbase,tzdata,python3,python3-distutils,python3.11-venv
debootstrap --variant=minbase --include="$packages" bookworm "$root"
rm -rf "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* \
  "$root"/var/log/* "$root"/usr/share/{doc,man,locale,info}/*
find "$root" -name __pycache__ -prune -exec rm -r {} +
for name in python3.11 python3 python; do ln -s /usr/bin/python3.11 "$root/usr/local/bin/$name"; done
