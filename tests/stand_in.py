"""A compiler that takes no time: it writes empty objects and "links" them into a copy of a library that exists."""

from pathlib import Path

SCRIPT = """#!/bin/sh
while [ $# -gt 0 ]; do
  case $1 in -o) output=$2;; -MF) needs=$2;; esac
  shift
done
if [ -z "$output" ]; then echo 12.2.0; exit; fi
if [ -e FOLDER/hang ]; then echo $$ >> FOLDER/hanging; sleep 600; fi
if [ -e FOLDER/fail ]; then echo "g++ -Werror=flag"; echo "ops.cpp:7:1: error: planted"; exit 1; fi
case $output in
  *.so) cp LIBRARY "$output";;
  *) : > "$output"; echo "$output:" > "$needs";;
esac
"""


def compiler(folder: Path, library: Path) -> Path:
    """For CXX. It fails while there is a file `fail` in the folder, and hangs while there is a file `hang`, with its
    process number in `hanging`."""
    path = folder / "bin" / "g++"
    path.parent.mkdir()
    path.write_text(SCRIPT.replace("FOLDER", str(folder)).replace("LIBRARY", str(library)))
    path.chmod(0o755)
    return path
