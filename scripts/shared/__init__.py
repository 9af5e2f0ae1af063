"""What the scripts share.

They import it before torch, which takes a second or more: until `options.run`, Ctrl-C ends the process at once, since
the KeyboardInterrupt of Python's own handler would be a traceback, or be lost in torch.
"""

import signal
import sys

if "torch" not in sys.modules and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
