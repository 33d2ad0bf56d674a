"""Types into an editor as a person does, by a terminal of its own: what keys it gets are the arguments after `--keys`, with \\x escapes."""

import os
import pty
import select
import sys
import time

split = sys.argv.index("--keys")
command, keys = sys.argv[1:split], [k.encode().decode("unicode_escape").encode("latin1") for k in sys.argv[split + 1:]]
pid, terminal = pty.fork()
if pid == 0:
    os.environ["TERM"] = "vt100"
    os.execvp(command[0], command)


def quiet(seconds):
    """Reads what it draws until it draws nothing more; whether it still runs."""
    while select.select([terminal], [], [], seconds)[0]:
        try:
            if not os.read(terminal, 65536):
                return False
        except OSError:
            return False
    return True


quiet(1.0)
for key in keys:
    os.write(terminal, key)
    if not quiet(0.3):
        break
deadline = time.monotonic() + 120
while time.monotonic() < deadline:
    quiet(0.1)
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
        sys.exit(os.waitstatus_to_exitcode(status))
os.kill(pid, 9)
sys.exit("the editor did not end")
