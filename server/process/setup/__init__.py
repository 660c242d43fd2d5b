"""What a process needs before its work: a log, sockets, open files, an end with its parent."""
