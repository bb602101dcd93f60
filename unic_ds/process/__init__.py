"""This process: entry point, signals, standard streams, rendezvous, console."""
