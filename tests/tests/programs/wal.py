"""SQLite's own stress of its write-ahead log (walthread1 of its sources), by threads and processes: writers add rows and keep a
checksum of all rows beside them, readers check it, checkpoints of all kinds run between them, and writers are killed."""

import hashlib
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import threading
import time

PATH, SECONDS = sys.argv[1], float(sys.argv[2])
WRITERS, READERS, THREADS = 2, 2, 2
END = time.monotonic() + SECONDS


def connect():
    connection = sqlite3.connect(PATH, timeout=120, isolation_level=None)
    connection.execute("PRAGMA synchronous=NORMAL")
    return connection


def digest(connection):
    rows = connection.execute("SELECT id, v FROM t ORDER BY id").fetchall()
    return hashlib.md5(repr(rows).encode()).hexdigest(), len(rows)


def check(connection):
    connection.execute("BEGIN")
    found, count = digest(connection)
    (want,) = connection.execute("SELECT v FROM checksum").fetchone()
    connection.execute("COMMIT")
    assert found == want, f"{count} rows are not those of their checksum"


def write(connection, source):
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO t(v) VALUES(?)", (source.randbytes(source.randrange(1, 3000)),))
    if source.random() < 0.5:
        connection.execute("DELETE FROM t WHERE id = (SELECT id FROM t ORDER BY random() LIMIT 1)")
    connection.execute("UPDATE checksum SET v=?", (digest(connection)[0],))
    connection.execute("ROLLBACK" if source.random() < 0.1 else "COMMIT")


def thread(seed, writes, done, failures):
    try:
        connection, source = connect(), random.Random(seed)
        while time.monotonic() < END:
            if writes:
                write(connection, source)
            else:
                check(connection)
            if source.random() < 0.05:
                kind = source.choice(["PASSIVE", "FULL", "RESTART", "TRUNCATE"])
                connection.execute(f"PRAGMA wal_checkpoint({kind})").fetchone()
            done[seed % len(done)] += 1
        connection.close()
    except BaseException as error:
        failures.append(repr(error))


def process(seed, writes, counts):
    done, failures = [0] * THREADS, []
    threads = [threading.Thread(target=thread, args=(seed * THREADS + n, writes, done, failures)) for n in range(THREADS)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    counts.put((writes, sum(done), failures))


connection = connect()
assert connection.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
connection.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB)")
connection.execute("CREATE TABLE checksum(v TEXT)")
connection.execute("INSERT INTO checksum VALUES(?)", (digest(connection)[0],))

context = multiprocessing.get_context("fork")
counts = context.Queue()
# A connection does not go through a fork.
connection.close()
workers = [context.Process(target=process, args=(n, n < WRITERS, counts)) for n in range(WRITERS + READERS)]
[w.start() for w in workers]
# Beside them one that is killed in the middle of what it does, again and again.
kills = 0
while time.monotonic() < END - 0.5:
    victim = context.Process(target=process, args=(1000 + kills, True, context.Queue()))
    victim.start()
    time.sleep(random.uniform(0.1, 0.4))
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    kills += 1
results = [counts.get(timeout=180) for _ in workers]
[w.join() for w in workers]
assert not any(failures for _, _, failures in results), results
assert all(count > 0 for _, count, _ in results), results
connection = connect()
check(connection)
assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
connection.close()
assert not os.path.exists(PATH + "-wal"), "the last connection removes the log"
print("writes", sum(c for w, c, _ in results if w), "checks", sum(c for w, c, _ in results if not w), "kills", kills)
