"""The command line: checks a config, starts Ray, shows what happens, and takes down what it started."""
