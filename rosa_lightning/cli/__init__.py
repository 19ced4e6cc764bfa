"""The command line.

`main` runs Lightning's commands (fit, validate, test, predict) and those of this package
(`commands`: export, inspect, audit, report, bench); `parser` and `configuration` read and check
what the user writes.
"""
