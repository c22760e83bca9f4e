"""What is run as `python -m scripts.NAME`; a reader that closes the pipe (`| head`) ends none of it in a traceback."""

import sys

from loop.run.streams import forgive_streams

if sys.argv[0] == "-m":  # while Python looks for the module to run
    forgive_streams()
