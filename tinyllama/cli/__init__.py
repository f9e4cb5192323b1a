"""The command line, `tinyllama`. `app` assembles it; each command imports what it needs when it runs."""
