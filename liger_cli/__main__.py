"""python -m liger_cli is the same program as liger."""

from liger_cli.app import main

main()
