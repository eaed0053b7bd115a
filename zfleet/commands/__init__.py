"""The subcommands. These modules import nothing heavy until a command runs, so that `zfleet --help` is quick."""
