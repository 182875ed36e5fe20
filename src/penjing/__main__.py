"""`python -m penjing` is the command `penjing`."""

from penjing.cli.commands import entry

if __name__ == "__main__":
    entry()
