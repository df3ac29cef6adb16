"""What every part of the program uses: the machine, the hub, numbers, files."""
