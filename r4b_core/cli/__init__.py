"""The `r4b` command: one file per subcommand, none of which imports anything heavy before it runs."""
