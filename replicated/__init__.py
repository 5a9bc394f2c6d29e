"""The daemon: captures, stores and serves what the library and the command line ask for."""
