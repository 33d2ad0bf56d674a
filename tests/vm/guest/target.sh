# Two initiator paths to one disk: a block-backed LUN of the kernel's SCSI target, behind two loopback nexuses.
# /dev/sda and /dev/sdb are what the test calls paths; the target has persistent reservations.
set -euo pipefail

target=/sys/kernel/config/target
mount -t configfs configfs /sys/kernel/config
mkdir -p "$target/core/iblock_0/shared"
# By its serial number the disk has the same name on both paths.
echo 5ada0001 >"$target/core/iblock_0/shared/wwn/vpd_unit_serial"
echo udev_path=/dev/vda >"$target/core/iblock_0/shared/control"
echo 1 >"$target/core/iblock_0/shared/enable"
for path in 1 2; do
    wwn=naa.600140500000000$path
    mkdir -p "$target/loopback/$wwn/tpgt_1/lun/lun_0"
    # Without a nexus of its own a path is no initiator. The disk appears with its link.
    echo "naa.600140500000001$path" >"$target/loopback/$wwn/tpgt_1/nexus"
    ln -s "$target/core/iblock_0/shared" "$target/loopback/$wwn/tpgt_1/lun/lun_0/shared"
    letter=$([ "$path" = 1 ] && echo a || echo b)
    for _ in $(seq 100); do
        [ -b "/dev/sd$letter" ] && break
        sleep 0.1
    done
    [ -b "/dev/sd$letter" ] || { echo "target: /dev/sd$letter did not appear"; exit 1; }
done
echo "target: $(cat /sys/block/sda/device/vendor /sys/block/sda/device/model | tr -s ' \n' ' ')behind /dev/sda and /dev/sdb, wwid $(cat /sys/block/sda/device/wwid)"
# A disk of its own beside them: /dev/sdc.
mkdir -p "$target/core/fileio_0/other" "$target/loopback/naa.6001405000000003/tpgt_1/lun/lun_0"
truncate -s 128M /tmp/other
echo 5ada0002 >"$target/core/fileio_0/other/wwn/vpd_unit_serial"
echo "fd_dev_name=/tmp/other,fd_dev_size=$((128 << 20))" >"$target/core/fileio_0/other/control"
echo 1 >"$target/core/fileio_0/other/enable"
echo naa.6001405000000013 >"$target/loopback/naa.6001405000000003/tpgt_1/nexus"
ln -s "$target/core/fileio_0/other" "$target/loopback/naa.6001405000000003/tpgt_1/lun/lun_0/other"
for _ in $(seq 100); do
    [ -b /dev/sdc ] && break
    sleep 0.1
done
[ -b /dev/sdc ] || { echo "target: /dev/sdc did not appear"; exit 1; }
