"""The command line.

`main` runs Lightning's commands (fit, validate, test, predict) and those of this package
(`compare`, and in `commands` export, inspect, audit and report); `parser` and `configuration` read
and check what the user writes.
"""
