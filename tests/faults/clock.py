"""Run a Python script under a clock that is off:  python3 -I clock.py OFFSET_FILE SCRIPT [ARGS]

time.time() is off by the seconds in OFFSET_FILE, read at every call: a test can let it jump.
"""
import runpy
import sys
import time

real_time = time.time
offset_file = sys.argv[1]


def shifted_time():
    """The time of a clock that somebody set wrong."""
    try:
        with open(offset_file, encoding="ascii") as handle:
            return real_time() + float(handle.read() or 0)
    except OSError:
        return real_time()


time.time = shifted_time
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
