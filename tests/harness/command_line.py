"""The command line, called in this process."""

from mochi_core.__main__ import main


def convert(*arguments):
    assert main(["convert", *map(str, arguments)]) == 0


def refused(capsys, *arguments):
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err
