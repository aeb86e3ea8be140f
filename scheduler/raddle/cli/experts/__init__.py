"""Expert maps on the command line."""

import os

# The CPU time that is shown is that of one thread: numpy's matrix library would start more. It
# reads this when it is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
