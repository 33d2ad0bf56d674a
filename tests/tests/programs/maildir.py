"""Delivers mail into one Maildir from several processes, while others take it out: every message arrives once, whole."""

import hashlib
import mailbox
import multiprocessing
import os
import sys
import time

FOLDER, DELIVERERS, READERS, EACH = sys.argv[1], 4, 3, int(sys.argv[2])


def deliver(who):
    box = mailbox.Maildir(FOLDER)
    for number in range(EACH):
        body = (f"{who}-{number} " * (1 + number * 37 % 900)).encode()
        digest = hashlib.sha256(body).hexdigest()
        message = f"Subject: {who}-{number}\nX-Digest: {digest}\n\n".encode() + body
        # By tmp/, fsync, and a link or rename into new/.
        box.add(message)


def take(_):
    """Claims messages by renaming them from new/ to cur/, as servers do, and reads them."""
    taken = []
    quiet = 0
    while quiet < 20:
        names = os.listdir(f"{FOLDER}/new")
        quiet = 0 if names or os.path.exists(f"{FOLDER}/busy") else quiet + 1
        for name in names:
            try:
                os.rename(f"{FOLDER}/new/{name}", f"{FOLDER}/cur/{name}:2,S")
            except FileNotFoundError:
                continue  # Another reader was faster.
            with open(f"{FOLDER}/cur/{name}:2,S", "rb") as file:
                head, _, body = file.read().partition(b"\n\n")
            lines = dict(line.split(b": ", 1) for line in head.splitlines())
            assert hashlib.sha256(body).hexdigest().encode() == lines[b"X-Digest"], name
            taken.append(lines[b"Subject"].decode())
        time.sleep(0.01)
    return taken


mailbox.Maildir(FOLDER, create=True)
open(f"{FOLDER}/busy", "w").close()
with multiprocessing.Pool(READERS) as readers, multiprocessing.Pool(DELIVERERS) as deliverers:
    taking = readers.map_async(take, range(READERS), chunksize=1)
    deliverers.map(deliver, range(DELIVERERS), chunksize=1)
    os.remove(f"{FOLDER}/busy")
    found = sorted(sum(taking.get(), []))
assert found == sorted(f"{who}-{number}" for who in range(DELIVERERS) for number in range(EACH)), len(found)
assert os.listdir(f"{FOLDER}/tmp") == [] and os.listdir(f"{FOLDER}/new") == []
assert len(os.listdir(f"{FOLDER}/cur")) == len(found)
print(len(found))
