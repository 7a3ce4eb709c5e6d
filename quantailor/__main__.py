"""`python -m quantailor`, and so `torchrun -m quantailor`: the same as the command `quantailor`."""

from quantailor.cli.main import run

if __name__ == "__main__":
    run()
