"""Runs programs that nobody has read, contained. Linux 5.14 or later, standard library only.

`server` is a process of its own that forks for each program, `groups` makes its control group, `namespaces` builds the world
that the program sees, `privileges` takes from it what it must not have, `judged` runs it and reports, `supervisor` watches
it as process 1 there.
`kernel` has the system calls that Python's `os` lacks.
"""
