"""Exit codes of the command line."""

#: All went well.
SUCCESS = 0
#: A failure of the program.
FAILURE = 1
#: A mistake that the person can mend.
USAGE = 2
#: A strict audit found unreadable images, or images in more than one split.
FOUND = 3
#: A challenger was not promoted.
REFUSED = 4
#: Interrupted by the person.
INTERRUPTED = 130
