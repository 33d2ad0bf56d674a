# Takes down the cluster under $SHARDFS_TEST_ROOT once standard input ends: the test program closed it, or
# is gone. Touches only what lies under that folder.
root=$SHARDFS_TEST_ROOT
cat >/dev/null
[ -d "$root" ] || exit 0

# A test that freezes a filesystem may have ended before it thawed it; then nothing on it would end.
awk -v under="$root/" '$3 == "ext4" && index($2, under) == 1 { print $2 }' /proc/self/mounts | while read -r point; do
    timeout -k 1 5 fsfreeze --unfreeze "$point" 2>/dev/null
done

timeout -k 5 60 "$SHARDFS_TEST_BIN/shardfs" dev down --dir "$root/c" >"$root/guard.log" 2>&1 </dev/null

for _ in 1 2 3; do
    for process in /proc/[0-9]*; do
        command=$({ tr '\0' ' ' <"$process/cmdline"; } 2>/dev/null)
        if [[ $command == *"$root/"* ]]; then
            kill -KILL "${process#/proc/}" 2>/dev/null
        fi
    done
    sleep 0.1
done

# Deepest first. A disk that a test made for its volumes goes after the devices over its files.
for last in "" "" -l; do
    awk -v under="$root/" 'index($2, under) == 1 { print $2 }' /proc/self/mounts | tac | while read -r point; do
        umount "$point" 2>/dev/null || { [ -z "$last" ] || umount -l "$point"; }
    done
    losetup --noheadings --list --output NAME,BACK-FILE | while read -r device file; do
        if [[ $file == "$root/"* ]]; then
            # The flag would outlive the detaching.
            blockdev --setrw "$device"
            losetup --detach "$device"
        fi
    done
done

# What the programs wrote for people outlives the cluster.
if [ -n "$SHARDFS_TEST_LOGS" ]; then
    kept=$SHARDFS_TEST_LOGS/${root##*/shardfs-test.}
    mkdir -p "$kept"
    find "$root" -xdev -name '*.log' -size -20M -exec cp -t "$kept" {} + 2>/dev/null
    find "$SHARDFS_TEST_LOGS" -mindepth 1 -mmin +240 -delete 2>/dev/null
fi
if awk -v under="$root/" 'index($2, under) == 1 { found = 1 } END { exit !found }' /proc/self/mounts; then
    echo "shardfs-test-guard: something is still mounted under $root; not removing it" >&2
else
    rm -rf --one-file-system "$root"
fi
