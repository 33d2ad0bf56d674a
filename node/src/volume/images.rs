//! Images of volumes: their whole content as it was at one moment, and what is made of them.
//!
//! **Why nothing is frozen.** An image holds what the device held between two writes: every write that was answered before, and of those that
//! were under way some, each wholly. A reflink of a backing file waits for the writes that are inside and keeps out the others, and a
//! snapshot of a cloud's disk is of one moment by its maker's word. That is what a power cut leaves on a disk without a cache of its own; and
//! whoever survives power cuts needs no freeze: ext4 replays its journal, and each shard the log up to its last acknowledged sync (tests/tests/power.rs
//! tries that). A freeze would have every writer wait for all that is dirty, and tell of no later moment.
//!
//! An image is laid down under a name that is no volume's, is mounted where no volume is, and becomes a volume's backing at last, in one step.
//! Invariants: what is mounted here is known to nobody else, so there is nobody to fence; an image itself is never mounted nor written, only
//! copies of it are.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rustix::io::Errno;
use rustix::mount::MountFlags;
use shardfs_proto::types::{Error, Reason, Result, VolumeId};

use super::loopdev::sys;
use super::{VolumeSpec, ext4, io_error, loopdev, make_mount_point, mounts, verify_identity, write_identity};

/// Bytes that are copied at a time where blocks cannot be shared.
const COPY_BYTES: usize = 1 << 20;
/// Lines of what e2fsck says that are passed on.
const FSCK_LINES_MAX: usize = 64;

/// An image, or one that is to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Image {
    /// The backup that it is of.
    pub backup: String,
    /// The volume that it is of.
    pub volume: VolumeId,
    /// That volume's cluster.
    pub cluster_id: String,
    /// Where it is: a file, or the id of a snapshot; empty: not known.
    pub place: String,
}

/// What a kind of volume does with images. Blocking; every step may be repeated.
pub trait Images: Send + Sync {
    /// Where the image of a backup of the volume will be, as far as that can be told before; `folder`: where an operator wants images.
    /// Fails if there can be none.
    fn image_place(&self, spec: &VolumeSpec, backup: &str, folder: Option<&Path>) -> Result<String>;
    /// Takes an image of the volume as it is at one moment, while it is used; see the module. Answers where it is. Repeated, it is taken
    /// anew or is the same.
    fn back_up(&self, spec: &VolumeSpec, image: &Image) -> Result<String>;
    /// Deletes an image, also one of which not everything is there. Done already: no error.
    fn drop_image(&self, image: &Image) -> Result<()>;
    /// Makes an empty place for this attempt to lay an image down in: nothing else makes one. A disk needs none.
    fn make_place(&self, spec: &VolumeSpec, attempt: &str) -> Result<()>;
    /// Takes away the place of an attempt. Done already: no error.
    fn drop_place(&self, spec: &VolumeSpec, attempt: &str) -> Result<()>;
    /// Takes away the places of all attempts but `except`, with what was laid down in them: those attempts can lay nothing down any
    /// more, nor put anything in place.
    fn drop_places(&self, spec: &VolumeSpec, except: Option<&str>) -> Result<()>;
    /// Puts the content of an image in the attempt's place, where it can become the volume's, and answers the file or device that has it,
    /// which is not mounted. Fails if the place is gone. A disk was made of the image before.
    fn lay_down(&self, spec: &VolumeSpec, image: &Image, attempt: &str) -> Result<PathBuf>;
    /// Makes what the attempt has laid down the volume's backing; fails, and changes nothing, if its place is gone. What is there is set
    /// aside under a name that ends with `aside`; answers where. Without that word, only what is the volume's already may be there, and goes.
    fn put_in_place(&self, spec: &VolumeSpec, attempt: &str, aside: Option<&str>) -> Result<Option<PathBuf>>;
    /// Forgets what was laid down, or put in place, for a volume that nobody serves and that is in no record. Done already: no error.
    fn discard(&self, spec: &VolumeSpec) -> Result<()>;
}

/// What kinds of volumes say that have no images.
pub(super) fn unsupported<T>(kind: &str, instead: &str) -> Result<T> {
    Err(Error::new(
        Reason::Unsupported,
        format!("volumes of kind `{kind}` cannot be copied at one moment by a node: {instead}"),
    ))
}

/// Makes `to` a copy of a file as it is between two writes, while it is written. An older `to` goes.
pub(super) fn clone_at_once(from: &Path, to: &Path) -> Result<()> {
    let copy = fresh_file(to)?;
    let source = open(from)?;
    if let Err(e) = rustix::fs::ioctl_ficlone(&copy, &source) {
        remove_file(to)?;
        return Err(match e {
            Errno::XDEV | Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL => Error::new(
                Reason::Unsupported,
                format!(
                    "{} cannot share its blocks with {}: a file that is written can be copied at one moment only by that. Put the \
                     backing files on an XFS or Btrfs, and backups (--backup-dir) on the same one",
                    from.display(),
                    to.display()
                ),
            ),
            other => io_error(&format!("copying {} to {}", from.display(), to.display()), &other.into()),
        });
    }
    settle_file(&copy, to)
}

/// Copies a file that nobody writes into one that is there, and empty: it shares its blocks if it can. An error if that one is gone.
pub(super) fn copy_into(from: &Path, to: &Path) -> Result<()> {
    let source = open(from)?;
    let copy = OpenOptions::new().read(true).write(true).open(to).map_err(|e| gone(to, &e))?;
    if rustix::fs::ioctl_ficlone(&copy, &source).is_err() {
        copy_data(&source, &copy)
            .map_err(|e| io_error(&format!("copying {} to {}", from.display(), to.display()), &e))?;
    }
    settle_file(&copy, to)
}

/// A file in which an attempt lays something down cannot be opened.
fn gone(laid: &Path, error: &std::io::Error) -> Error {
    match error.kind() {
        ErrorKind::NotFound => Error::unavailable(format!(
            "{} is gone: another attempt has begun since, and goes on instead of this one",
            laid.display()
        )),
        _other => io_error(&format!("opening {}", laid.display()), error),
    }
}

/// Makes an empty file; an older one of the name goes, and who has it open keeps it.
pub(super) fn make_empty(path: &Path) -> Result<()> {
    settle_file(&fresh_file(path)?, path)
}

/// Copies what is no hole.
fn copy_data(mut source: &File, mut copy: &File) -> std::io::Result<()> {
    let length = source.metadata()?.len();
    copy.set_len(length)?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = 0;
    while at < length {
        let begin = match rustix::fs::seek(source, rustix::fs::SeekFrom::Data(at)) {
            Ok(begin) => begin,
            // Holes up to the end.
            Err(Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(source, rustix::fs::SeekFrom::Hole(begin))?;
        source.seek(SeekFrom::Start(begin))?;
        copy.seek(SeekFrom::Start(begin))?;
        at = begin;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
            source.read_exact(&mut buffer[..wanted])?;
            copy.write_all(&buffer[..wanted])?;
            at += wanted as u64;
        }
    }
    Ok(())
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|e| io_error(&format!("opening {}", path.display()), &e))
}

/// A new, empty file under this name.
fn fresh_file(path: &Path) -> Result<File> {
    remove_file(path)?;
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|e| io_error(&format!("making {}", path.display()), &e))
}

fn settle_file(file: &File, path: &Path) -> Result<()> {
    file.sync_all().map_err(|e| io_error(&format!("syncing {}", path.display()), &e))?;
    sync_folder(path)
}

fn sync_file(path: &Path) -> Result<()> {
    open(path)?.sync_all().map_err(|e| io_error(&format!("syncing {}", path.display()), &e))
}

fn sync_laid(laid: &Path) -> Result<()> {
    let file = File::open(laid).map_err(|e| gone(laid, &e))?;
    file.sync_all().map_err(|e| io_error(&format!("syncing {}", laid.display()), &e))
}

/// Makes the names beside a file durable.
fn sync_folder(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    File::open(parent)
        .and_then(|parent| parent.sync_all())
        .map_err(|e| io_error(&format!("syncing {}", parent.display()), &e))
}

/// Removes a file; done already: no error.
pub(super) fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            Err(io_error(&format!("removing {}", path.display()), &e))
        }
        Ok(()) => sync_folder(path),
        Err(_) => Ok(()),
    }
}

/// Whether a file is there; fails if it does not look like an image. Changes nothing.
pub fn check_image_there(image: &Path) -> Result<bool> {
    if !image.try_exists().map_err(|e| io_error(&format!("looking for {}", image.display()), &e))? {
        return Ok(false);
    }
    match ext4::probe(image)? {
        ext4::Content::Ext4 { .. } => Ok(true),
        ext4::Content::Zeros | ext4::Content::Unknown => Err(Error::corrupt(format!(
            "{} is no image of a volume, or damaged: nothing was changed",
            image.display()
        ))),
    }
}

/// Gives a file that was laid down the name of one that goes, in one step.
pub(super) fn replace(laid: &Path, source: &Path) -> Result<()> {
    sync_laid(laid)?;
    fs::rename(laid, source).map_err(|e| io_error(&format!("naming {}", source.display()), &e))?;
    sync_folder(source)
}

/// Gives a file that was laid down its name; what has that name keeps another one. Answers that.
///
/// At any moment there is a whole file under the name, and if nothing is laid down (another attempt has taken that away), nothing is changed.
pub(super) fn put_in_place(laid: &Path, source: &Path, aside: &str) -> Result<Option<PathBuf>> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    const ATTEMPTS_MAX: usize = 100;
    let mut set_aside = None;
    sync_laid(laid)?;
    if source.exists() {
        let name = |n: usize| {
            let mut name = source.file_name().unwrap_or_default().to_owned();
            name.push(format!(".{aside}"));
            if n > 0 {
                name.push(format!("-{n}"));
            }
            source.with_file_name(name)
        };
        // Never over anything: it may be all that somebody has.
        for to in (0..ATTEMPTS_MAX).map(name) {
            match fs::hard_link(source, &to) {
                Ok(()) => {
                    set_aside = Some(to);
                    break;
                }
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(io_error(&format!("naming {}", to.display()), &e)),
            }
        }
        let Some(to) = &set_aside else {
            return Err(Error::invalid(format!(
                "{ATTEMPTS_MAX} files are set aside beside {}: delete those that are of no use",
                source.display()
            )));
        };
        sync_folder(to)?;
    }
    let named = match &set_aside {
        // Its name beside is durable: nothing is lost by this.
        Some(_) => fs::rename(laid, source),
        // Never over anything: somebody may have put it there since.
        None => renameat_with(CWD, laid, CWD, source, RenameFlags::NOREPLACE).map_err(Into::into),
    };
    if let Err(e) = named {
        if let Some(to) = &set_aside {
            remove_file(to)?;
        }
        return Err(io_error(&format!("naming {}", source.display()), &e));
    }
    sync_folder(source)?;
    Ok(set_aside)
}

/// A copy of an image, mounted for writing at a place of this process's own. Replays the journal.
#[derive(Debug)]
pub struct PrivateMount {
    at: PathBuf,
    device: Option<PathBuf>,
}

impl PrivateMount {
    /// Mounts a file or a device at `at`, after cleaning up what a process that was killed has left there.
    pub fn open(bare: &Path, at: &Path) -> Result<PrivateMount> {
        clean(at)?;
        make_mount_point(at)?;
        let meta = fs::metadata(bare).map_err(|e| io_error(&format!("looking at {}", bare.display()), &e))?;
        let device = match meta.file_type().is_block_device() {
            true => None,
            false => {
                let device = sys::attach_device(bare, &tag(at)?)?;
                let open = sys::open_device(&device, false)
                    .map_err(|e| io_error(&format!("opening {}", device.display()), &e))?;
                sys::set_read_only(&device, &open, false)?;
                Some(device)
            }
        };
        let mount = PrivateMount { at: at.to_owned(), device };
        let flags = MountFlags::NOATIME | MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
        let options = CString::new("errors=remount-ro").expect("no NUL");
        let source = mount.device.as_deref().unwrap_or(bare);
        if let Err(e) = rustix::mount::mount(source, at, "ext4", flags, options.as_c_str()) {
            if let Err(worse) = clean(at) {
                tracing::warn!(at = %at.display(), error = %worse, "after an image that could not be mounted");
            }
            return Err(Error::corrupt(format!(
                "mounting a copy of the image, {} at {}: {e}: it is no volume's, or damaged",
                bare.display(),
                at.display()
            )));
        }
        Ok(mount)
    }

    /// The folder that holds the shards.
    pub fn root(&self) -> &Path {
        &self.at
    }

    /// Unmounts it: all that was written is on it then. No file of it is open.
    pub fn close(self) -> Result<()> {
        clean(&self.at)
    }
}

/// Takes away what is mounted at such a place, if anything is, with its loop device.
pub fn clean(at: &Path) -> Result<()> {
    mounts::unmount_all(at)?;
    for device in sys::devices()?.into_iter().filter(|device| tag(at).is_ok_and(|tag| device.tag == tag)) {
        sys::detach_device(&device.path)?;
    }
    match fs::remove_dir(at) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(io_error(&format!("removing {}", at.display()), &e)),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn tag(at: &Path) -> Result<sys::Tag> {
    let name = at.file_name().unwrap_or_default().to_string_lossy().into_owned();
    loopdev::tag(at, &VolumeId::new(name)?)
}

/// Fails unless what is mounted there is this volume.
pub fn check_identity(root: &Path, spec: &VolumeSpec) -> Result<()> {
    verify_identity(root, &VolumeSpec { formatted: true, ..spec.clone() })
}

/// Makes what is mounted there this volume, as far as its own words go; see [`relabel`].
pub fn identify(root: &Path, spec: &VolumeSpec) -> Result<()> {
    write_identity(root, spec)
}

/// Makes durable what was changed at a volume's root, names included.
pub fn sync(root: &Path) -> Result<()> {
    let failed = |e: std::io::Error| io_error(&format!("syncing {}", root.display()), &e);
    rustix::fs::syncfs(&File::open(root).map_err(failed)?).map_err(|e| failed(e.into()))
}

/// Gives the ext4 in a file or device, which is not mounted, the label and UUID of a volume. Repeating it is harmless.
pub fn relabel(bare: &Path, spec: &VolumeSpec) -> Result<()> {
    let meta = fs::metadata(bare).map_err(|e| io_error(&format!("looking at {}", bare.display()), &e))?;
    let uuid = match meta.file_type().is_block_device() {
        true => ext4::volume_uuid(spec),
        false => ext4::marked_uuid(spec),
    };
    // Checksums of its blocks are made with the UUID, unless what they are made with is noted: then none has to be made anew.
    run("tune2fs", &["-O", "metadata_csum_seed"], bare)
        .and_then(|output| succeeded("tune2fs", bare, &output))?;
    let (label, uuid) = (ext4::label(&spec.id), ext4::uuid_text(uuid));
    run("tune2fs", &["-L", &label, "-U", &uuid], bare)
        .and_then(|output| succeeded("tune2fs", bare, &output))?;
    sync_file(bare)
}

/// Whether the ext4 in a file is that volume's, by its label and UUID.
pub(super) fn is_of(path: &Path, spec: &VolumeSpec) -> bool {
    ext4::check_label(path, spec).is_ok()
        && ext4::uuid(path).is_ok_and(|uuid| uuid == ext4::marked_uuid(spec))
}

/// What is wrong with the ext4 in a file or device, which is not mounted and whose journal was replayed. Changes nothing.
pub fn check_filesystem(bare: &Path) -> Result<Vec<String>> {
    let output = run("e2fsck", &["-f", "-n"], bare)?;
    // 0: in order; 4: errors that were left; others: it could not look.
    match output.status.code() {
        Some(0) => Ok(Vec::new()),
        Some(4) => {
            let text = String::from_utf8_lossy(&output.stdout);
            let lines =
                text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("Pass "));
            Ok(lines.take(FSCK_LINES_MAX).map(str::to_owned).collect())
        }
        _ => succeeded("e2fsck", bare, &output).map(|()| Vec::new()),
    }
}

fn run(program: &str, arguments: &[&str], bare: &Path) -> Result<Output> {
    let search = std::env::var("PATH").unwrap_or_default();
    Command::new(program)
        .env("PATH", format!("{search}:/usr/sbin:/sbin"))
        .env("LC_ALL", "C")
        .args(arguments)
        .arg(bare)
        .output()
        .map_err(|e| match e.kind() {
            ErrorKind::NotFound => {
                Error::new(Reason::Unsupported, format!("{program} is not installed: install e2fsprogs"))
            }
            _other => io_error(&format!("running {program}"), &e),
        })
}

fn succeeded(program: &str, bare: &Path, output: &Output) -> Result<()> {
    if output.status.success() {
        return Ok(());
    }
    Err(Error::io(format!(
        "{program} on {} failed ({}): {}",
        bare.display(),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    )))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    fn spec(id: &str, source: &Path) -> VolumeSpec {
        VolumeSpec {
            id: VolumeId::new(id).unwrap(),
            cluster_id: "c".into(),
            source: source.to_owned(),
            size_bytes: 0,
            formatted: true,
            mount_point: source.with_extension("mnt"),
            allow_unfenced: false,
        }
    }

    #[test]
    fn a_copy_has_the_same_bytes_and_holes() {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let (from, to) = (folder.path().join("a"), folder.path().join("b"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[7; 5000], 3 << 20).unwrap();
        file.write_all_at(b"end", (64 << 20) - 3).unwrap();
        assert_eq!(copy_into(&from, &to).unwrap_err().reason(), Reason::Unavailable);
        assert!(!to.exists(), "none is made");
        fs::write(&to, b"older").unwrap();
        make_empty(&to).unwrap();
        copy_into(&from, &to).unwrap();
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        let blocks = |path: &Path| fs::metadata(path).unwrap().blocks();
        assert!(blocks(&to) <= blocks(&from) + 64, "{} {}", blocks(&to), blocks(&from));
    }

    #[test]
    fn what_is_there_is_set_aside_and_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let (laid, source) = (folder.path().join("v.restoring"), folder.path().join("v"));
        for round in 0..3 {
            fs::write(&laid, format!("{round}")).unwrap();
            let aside = put_in_place(&laid, &source, "was").unwrap();
            assert_eq!(fs::read_to_string(&source).unwrap(), format!("{round}"));
            assert_eq!(aside.is_some(), round > 0);
        }
        assert_eq!(fs::read_to_string(folder.path().join("v.was")).unwrap(), "0");
        assert_eq!(fs::read_to_string(folder.path().join("v.was-1")).unwrap(), "1");
    }

    #[test]
    fn an_ext4_becomes_another_volumes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v.img");
        File::create(&path).unwrap().set_len(64 << 20).unwrap();
        let (old, new) = (spec("vol-1", &path), spec("vol-9", &path));
        ext4::make_filesystem(&path, &old.id, ext4::Target::SparseFile, ext4::marked_uuid(&old)).unwrap();
        assert!(is_of(&path, &old) && !is_of(&path, &new));
        for _ in 0..2 {
            relabel(&path, &new).unwrap();
            assert!(is_of(&path, &new) && !is_of(&path, &old));
        }
        assert_eq!(check_filesystem(&path).unwrap(), [""; 0]);
        // The root directory's inode.
        let text = fs::read(&path).unwrap();
        let at = text.windows(10).position(|bytes| bytes == b"lost+found").expect("the root directory");
        OpenOptions::new().write(true).open(&path).unwrap().write_all_at(b"LOST", at as u64).unwrap();
        assert!(!check_filesystem(&path).unwrap().is_empty());
    }

    #[test]
    fn a_file_that_cannot_share_its_blocks_is_refused_with_advice() {
        let (folder, other) =
            (tempfile::tempdir_in("/var/tmp").unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
        let (from, to) = (other.path().join("a"), folder.path().join("b"));
        fs::write(&from, b"x").unwrap();
        let error = clone_at_once(&from, &to).unwrap_err();
        assert_eq!(error.reason(), Reason::Unsupported);
        assert!(error.message().contains("XFS or Btrfs"), "{error}");
        assert!(!to.exists());
    }
}
