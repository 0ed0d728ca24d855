"""The subcommands that need no stage."""
