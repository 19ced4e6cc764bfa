"""The command line.

`main` runs Lightning's commands (fit, validate, test, predict) and those of this package: `chat`,
`inspect`, `audit`, `compare`, and in `commands` export and report. `parser` and `configuration`
read and check what the user writes.
"""
