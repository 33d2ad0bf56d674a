//! Holes, room that is set aside, ranges that are copied, and how deep renames lead.

use shardfs_proto::types::limits::{COPY_BYTES_MAX, DEPTH_MAX, MOVED_DEPTH_MAX};
use shardfs_proto::types::op::{AllocateMode, OpResult, Operation, SeekFor, SetAttr, Sought};
use shardfs_proto::types::{Attr, InodeNo, Reason, Result};

use super::harness::*;
use crate::shard::executor::{Command, Work};
use crate::shard::records::INODE_COST_BYTES;
use crate::shard::session::Live;
use crate::shard::{read, seek};

const ROOT: InodeNo = InodeNo::ROOT;
const KEEP: AllocateMode = AllocateMode::Allocate { keep_size: true };
const EXTEND: AllocateMode = AllocateMode::Allocate { keep_size: false };
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

async fn allocate(world: &World, inode: InodeNo, range: (u64, u64), mode: AllocateMode) -> Result<OpResult> {
    let (offset, end) = range;
    world.run(Operation::Allocate { inode, offset, length: end - offset, mode, kill_set_id: false }).await
}

async fn truncate(world: &World, inode: InodeNo, size: u64) -> Attr {
    let set = SetAttr { size: Some(size), ..SetAttr::default() };
    world.run(Operation::SetAttr { inode, set }).await.unwrap().attr.unwrap()
}

async fn extents_of(world: &World, inode: InodeNo) -> Vec<(u64, u64)> {
    extents(&world.view().await, inode)
}

async fn blocks(world: &World, inode: InodeNo) -> u64 {
    read::get_attr(&world.view().await, inode).unwrap().blocks
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn data_and_holes_are_told_apart_by_pages() {
    for mut world in World::both(None, 65536) {
        let file = world.create(ROOT, "f").await.inode;
        assert_eq!(extents_of(&world, file).await, []);
        truncate(&world, file, 100).await;
        assert_eq!(extents_of(&world, file).await, [], "a small file that nobody wrote to");
        truncate(&world, file, 0).await;
        // A page within a chunk that has nothing else.
        world.write(file, MIB + 8 * KIB, &[1; 4096]).await.unwrap();
        assert_eq!(extents_of(&world, file).await, [(MIB + 8 * KIB, MIB + 12 * KIB)]);
        truncate(&world, file, 2 * MIB).await;
        assert_eq!(extents_of(&world, file).await, [(MIB + 8 * KIB, MIB + 12 * KIB)]);
        // Two bytes on two pages, and what a seek from within tells.
        world.write(file, MIB + 32 * KIB - 1, &[2, 2]).await.unwrap();
        let both = [(MIB + 8 * KIB, MIB + 12 * KIB), (MIB + 28 * KIB, MIB + 36 * KIB)];
        assert_eq!(extents_of(&world, file).await, both);
        let view = world.view().await;
        let at = |offset, what| seek::seek(&view, file, offset, what).unwrap();
        assert_eq!(at(MIB + 9 * KIB, SeekFor::Data), Sought::Found(MIB + 9 * KIB));
        assert_eq!(at(MIB + 9 * KIB, SeekFor::Hole), Sought::Found(MIB + 12 * KIB));
        assert_eq!(at(5, SeekFor::Hole), Sought::Found(5));
        assert_eq!(at(MIB + 36 * KIB, SeekFor::Data), Sought::Nothing);
        assert_eq!(at(2 * MIB - 1, SeekFor::Hole), Sought::Found(2 * MIB - 1));
        assert_eq!(at(2 * MIB, SeekFor::Hole), Sought::Nothing);
        assert_eq!(at(u64::MAX, SeekFor::Data), Sought::Nothing);
        drop(view);
        // Punched again, within a chunk and as a whole.
        allocate(&world, file, (MIB + 28 * KIB, MIB + 32 * KIB), AllocateMode::PunchHole).await.unwrap();
        let left = [(MIB + 8 * KIB, MIB + 12 * KIB), (MIB + 32 * KIB, MIB + 36 * KIB)];
        world.reopen();
        assert_eq!(extents_of(&world, file).await, left);
        allocate(&world, file, (0, 2 * MIB), AllocateMode::PunchHole).await.unwrap();
        assert_eq!((extents_of(&world, file).await, blocks(&world, file).await), (vec![], 0));
        world.check("holes").await;

        // What was written without a gap is data, zeros as well.
        let dense = world.create(ROOT, "dense").await.inode;
        world.write(dense, 0, &[0; 100_000]).await.unwrap();
        world.write(dense, 100_000, &[0; 100_000]).await.unwrap();
        assert_eq!(extents_of(&world, dense).await, [(0, 200_000)]);
        let small = world.create(ROOT, "small").await.inode;
        world.write(small, 0, &[0; 3]).await.unwrap();
        assert_eq!(extents_of(&world, small).await, [(0, 3)]);
        // A gap behind the old end, in the old last chunk.
        world.write(dense, 300_000, &[7; 10]).await.unwrap();
        truncate(&world, dense, 200_000).await;
        world.write(dense, 195_000, &[7; 5000]).await.unwrap();
        truncate(&world, dense, 400_000).await;
        assert_eq!(extents_of(&world, dense).await, [(192_512, 200_704)]);
        // The last page that a file can have.
        let far = world.create(ROOT, "far").await.inode;
        world.write(far, (16 << 40) - 1, b"x").await.unwrap();
        assert_eq!(extents_of(&world, far).await, [((16 << 40) - 4096, 16 << 40)]);
        world.check("pages").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seek_looks_at_so_much_and_says_where_to_go_on() {
    let world = World::mem(None, 4096);
    let file = world.create(ROOT, "f").await.inode;
    allocate(&world, file, (0, 20 * MIB), EXTEND).await.unwrap();
    let view = world.view().await;
    assert_eq!(seek::seek(&view, file, 0, SeekFor::Data).unwrap(), Sought::Continue(16 * MIB));
    assert_eq!(seek::seek(&view, file, 16 * MIB, SeekFor::Data).unwrap(), Sought::Nothing);
    drop(view);
    world.write(file, 18 * MIB, b"x").await.unwrap();
    assert_eq!(extents_of(&world, file).await, [(18 * MIB, 18 * MIB + 4096)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_follow_what_is_allocated() {
    for world in World::both(None, 65536) {
        let file = world.create(ROOT, "f").await.inode;
        assert_eq!(truncate(&world, file, 1 << 40).await.blocks, 0);
        world.write(file, 128 * KIB, &[1; 65536]).await.unwrap();
        world.write(file, 512 * KIB + 4096, &[1; 4096]).await.unwrap();
        assert_eq!(blocks(&world, file).await, 256);
        // A chunk goes with its last page, in however many pieces.
        allocate(&world, file, (128 * KIB, 160 * KIB), AllocateMode::PunchHole).await.unwrap();
        assert_eq!(blocks(&world, file).await, 256);
        allocate(&world, file, (160 * KIB, 192 * KIB), AllocateMode::PunchHole).await.unwrap();
        assert_eq!(blocks(&world, file).await, 128);
        assert_eq!(
            truncate(&world, file, 512 * KIB + 2048).await.blocks,
            0,
            "only its hole is left of the chunk"
        );
        assert_eq!(world.shard().usage().used_bytes, INODE_COST_BYTES);
        world.check("blocks").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn room_that_is_set_aside_is_there() {
    for mut world in World::both(Some(MIB + 2 * INODE_COST_BYTES), 65536) {
        let file = world.create(ROOT, "f").await.inode;
        let other = world.create(ROOT, "g").await.inode;
        let over = allocate(&world, file, (0, MIB + 1), EXTEND).await.unwrap_err();
        assert_eq!(over.reason(), Reason::ShardFull);
        assert_eq!(read::get_attr(&world.view().await, file).unwrap().size, 0);
        let done = allocate(&world, file, (0, MIB), EXTEND).await.unwrap();
        let attr = done.attr.unwrap();
        assert_eq!((done.length, attr.size, attr.blocks), (MIB, MIB, 2048));
        assert_eq!(extents_of(&world, file).await, [], "it reads as a hole");
        world.reopen();
        // Nobody else gets it, and every write finds it.
        assert_eq!(world.write(other, 0, b"x").await.unwrap_err().reason(), Reason::ShardFull);
        for at in [0, 100 * KIB, 65_535, 512 * KIB, MIB - 1] {
            world.write(file, at, b"y").await.unwrap();
        }
        world.write(file, 0, &vec![1; MIB as usize]).await.unwrap();
        assert_eq!(world.shard().usage().used_bytes, MIB + 2 * INODE_COST_BYTES);
        // Zeroing keeps it; again, over what is there, it needs none.
        let zero = AllocateMode::ZeroRange { keep_size: false };
        allocate(&world, file, (4096, MIB), zero).await.unwrap();
        assert_eq!(extents_of(&world, file).await, [(0, 4096)]);
        assert_eq!(world.shard().usage().used_bytes, MIB + 2 * INODE_COST_BYTES);
        allocate(&world, file, (0, MIB), KEEP).await.unwrap();
        world.write(file, 64 * KIB, &[2; 65536]).await.unwrap();
        // A punch of a part of a chunk leaves what was set aside for the rest of it.
        allocate(&world, file, (64 * KIB, 68 * KIB), AllocateMode::PunchHole).await.unwrap();
        assert_eq!(world.write(other, 0, b"x").await.unwrap_err().reason(), Reason::ShardFull);
        // Of whole chunks it gives back.
        allocate(&world, file, (64 * KIB, 128 * KIB), AllocateMode::PunchHole).await.unwrap();
        world.write(other, 0, &[3; 65536]).await.unwrap();
        assert_eq!(world.write(file, 64 * KIB, b"z").await.unwrap_err().reason(), Reason::ShardFull);
        // Past its end a file has no room, but it is looked for.
        truncate(&world, file, 0).await;
        assert_eq!(world.shard().usage().used_bytes, 65536 + 2 * INODE_COST_BYTES);
        allocate(&world, file, (0, MIB - 65536), KEEP).await.unwrap();
        assert_eq!(allocate(&world, file, (0, MIB), KEEP).await.unwrap_err().reason(), Reason::ShardFull);
        assert_eq!(blocks(&world, file).await, 0);
        // In holes it has.
        truncate(&world, file, 256 * KIB).await;
        allocate(&world, file, (64 * KIB, 128 * KIB + 1), KEEP).await.unwrap();
        assert_eq!(blocks(&world, file).await, 256);
        world.check("set aside").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_allocation_kills_set_id_bits_on_request() {
    let world = World::mem(None, 65536);
    let file = world.create(ROOT, "f").await.inode;
    world.write(file, 0, &[1; 5000]).await.unwrap();
    let zero = |keep_size| AllocateMode::ZeroRange { keep_size };
    for mode in [KEEP, EXTEND, AllocateMode::PunchHole, zero(true), zero(false)] {
        for (before, killed) in [(0o6755, 0o755), (0o6745, 0o2745), (0o644, 0o644)] {
            for (kill_set_id, after) in [(false, before), (true, killed)] {
                let set = SetAttr { mode: Some(before), ..SetAttr::default() };
                world.run(Operation::SetAttr { inode: file, set }).await.unwrap();
                let operation =
                    Operation::Allocate { inode: file, offset: 100, length: 100, mode, kill_set_id };
                let attr = world.run(operation).await.unwrap().attr.unwrap();
                assert_eq!(attr.mode, after, "{mode:?}, {before:o}, {kill_set_id}");
                assert_eq!(read::get_attr(&world.view().await, file).unwrap().mode, after);
            }
        }
    }
    world.check("set-id bits").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_operation_sets_so_much_aside() {
    let world = World::mem(None, 4096);
    let file = world.create(ROOT, "f").await.inode;
    let whole = 65 * MIB;
    let done = allocate(&world, file, (1000, whole), EXTEND).await.unwrap();
    let attr = done.attr.unwrap();
    assert_eq!((done.length, attr.size, attr.blocks * 512), (64 * MIB - 1000, whole, 64 * MIB));
    let done = allocate(&world, file, (64 * MIB, whole), EXTEND).await.unwrap();
    assert_eq!((done.length, done.attr.unwrap().blocks * 512), (MIB, whole));
    world.room.0.store(MIB, std::sync::atomic::Ordering::Relaxed);
    let full = allocate(&world, file, (0, whole + 2 * MIB), EXTEND).await.unwrap_err();
    assert_eq!(full.reason(), Reason::VolumeFull);
    world.check("much").await;
}

fn copy(source: (InodeNo, u64), destination: (InodeNo, u64), length: u64) -> Operation {
    Operation::CopyRange {
        source: source.0,
        source_offset: source.1,
        destination: destination.0,
        destination_offset: destination.1,
        length,
        kill_set_id: false,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranges_are_copied_with_their_holes() {
    for mut world in World::both(None, 65536) {
        let (from, to) = (world.create(ROOT, "f").await.inode, world.create(ROOT, "g").await.inode);
        let content: Vec<u8> = (0..300_000u32).map(|i| (i / 7) as u8 | 1).collect();
        world.write(from, 0, &content).await.unwrap();
        world.write(from, 20 * 65536, &content[..65536]).await.unwrap();
        let done = world.run(copy((from, 0), (to, 0), u64::MAX)).await.unwrap();
        let attr = done.attr.unwrap();
        assert_eq!((done.length, attr.inode, attr.size), (21 * 65536, to, 21 * 65536));
        assert!(world.read(to).await == world.read(from).await);
        assert_eq!(extents_of(&world, to).await, [(0, 303_104), (20 * 65536, 21 * 65536)]);
        assert_eq!(attr.blocks, blocks(&world, from).await);
        // At another place within the chunks, over what is there, with the hole.
        let mut model = world.read(to).await;
        let source = world.read(from).await;
        let done = world.run(copy((from, 290_000), (to, 123), 200_000)).await.unwrap();
        assert_eq!(done.length, 200_000);
        model[123..200_123].copy_from_slice(&source[290_000..490_000]);
        assert!(world.read(to).await == model);
        world.reopen();
        assert!(world.read(to).await == model);
        // Behind its end, which leaves a gap, and past the source's end.
        let done = world.run(copy((from, 21 * 65536 - 5), (to, 3 * MIB), 100)).await.unwrap();
        assert_eq!((done.length, done.attr.unwrap().size), (5, 3 * MIB + 5));
        let before = read::get_attr(&world.view().await, to).unwrap();
        let done = world.run(copy((from, 21 * 65536), (to, 0), 100)).await.unwrap();
        assert_eq!((done.length, done.attr.unwrap()), (0, before), "nothing changes");
        // Within one file, and one chunk.
        model = world.read(to).await;
        world.run(copy((to, 1000), (to, 2000), 1000)).await.unwrap();
        model.copy_within(1000..2000, 2000);
        assert!(world.read(to).await == model);
        for (a, b) in [(1000, 1999), (1999, 1000), (5, 5)] {
            let overlapping = world.run(copy((to, a), (to, b), 1000)).await.unwrap_err();
            assert_eq!(overlapping.reason(), Reason::InvalidArgument, "{a} {b}");
        }
        // Small content.
        let (tiny, twin) = (world.create(ROOT, "tiny").await.inode, world.create(ROOT, "twin").await.inode);
        world.write(tiny, 0, b"0123456789").await.unwrap();
        world.run(copy((tiny, 2), (twin, 1), 5)).await.unwrap();
        assert_eq!(world.read(twin).await, b"\x0023456");
        let directory = world.run(copy((ROOT, 0), (twin, 0), 5)).await.unwrap_err();
        assert_eq!(directory.reason(), Reason::IsDirectory);
        let far = world.run(copy((tiny, 0), (twin, (16 << 40) - 3), 5)).await.unwrap_err();
        assert_eq!(far.reason(), Reason::FileTooLarge);
        world.check("copies").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_is_bounded_charged_and_made_once() {
    for mut world in World::both(Some(20 * MIB), 65536) {
        let (from, to) = (world.create(ROOT, "f").await.inode, world.create(ROOT, "g").await.inode);
        let piece = vec![5; MIB as usize];
        for number in 0..10 {
            world.write(from, number * MIB, &piece).await.unwrap();
        }
        let set = SetAttr { mode: Some(0o6755), ..SetAttr::default() };
        world.run(Operation::SetAttr { inode: to, set }).await.unwrap();
        let session = world.shard().open_session("test".into()).await.unwrap();
        let mut operation = copy((from, 0), (to, 0), 10 * MIB);
        if let Operation::CopyRange { kill_set_id, .. } = &mut operation {
            *kill_set_id = true;
        }
        let done = world.run_as(Some(session), Some(1), operation.clone()).await.unwrap();
        let attr = done.attr.clone().unwrap();
        assert_eq!((done.length, attr.size, attr.mode), (COPY_BYTES_MAX, COPY_BYTES_MAX, 0o755));
        world.write(to, 0, b"changed").await.unwrap();
        world.reopen();
        let again = world.run_as(Some(session), Some(1), operation).await.unwrap();
        assert_eq!(format!("{again:?}"), format!("{done:?}"));
        assert_eq!(&read::read(&world.view().await, to, 0, 7).unwrap()[..], b"changed");
        // The rest has no room in the shard: nothing of it is there.
        world.write(to, COPY_BYTES_MAX, &piece).await.unwrap();
        let full = world.run(copy((from, 0), (to, 9 * MIB), 2 * MIB)).await.unwrap_err();
        assert_eq!(full.reason(), Reason::ShardFull);
        assert_eq!(read::get_attr(&world.view().await, to).unwrap().size, 9 * MIB);
        // Over what is there it needs none; and room that was set aside stays so where the source has a hole.
        world.run(copy((from, 0), (to, 0), MIB)).await.unwrap();
        truncate(&world, from, 0).await;
        truncate(&world, from, MIB).await;
        allocate(&world, to, (0, 9 * MIB), KEEP).await.unwrap();
        let used = world.shard().usage().used_bytes;
        world.run(copy((from, 0), (to, 0), MIB)).await.unwrap();
        assert_eq!(world.shard().usage().used_bytes, used);
        let copied = read::read(&world.view().await, to, 0, MIB as u32).unwrap();
        assert!(copied.iter().all(|byte| *byte == 0));
        world.check("bounded copies").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_counts_for_what_its_group_holds() {
    let mut world = World::mem(None, 65536);
    let (from, to) = (world.create(ROOT, "f").await.inode, world.create(ROOT, "g").await.inode);
    for number in 0..9 {
        world.write(from, number * MIB, &vec![5; MIB as usize]).await.unwrap();
    }
    world.close();
    let store = world.store();
    let allocate = |inode, (offset, length), mode| Operation::Allocate {
        inode,
        offset,
        length,
        mode,
        kill_set_id: false,
    };
    let far = (1, 2 << 30);
    for operation in [
        copy((from, 0), (to, 0), u64::MAX),
        copy((from, 100), (to, 70_000), COPY_BYTES_MAX),
        allocate(to, far, EXTEND),
        allocate(from, far, AllocateMode::ZeroRange { keep_size: false }),
        allocate(from, (1, 9 * MIB), AllocateMode::PunchHole),
    ] {
        let what = format!("{operation:?}");
        let command = Command::Mutate { session: None, numbered: None, work: Work::Operation(operation) };
        let counted = command.size_bytes(65536);
        let mut live = Live::load(&*store).unwrap();
        let (answers, batch, _) = run_group(&*store, &mut live, &[command]);
        assert!(answers.iter().all(Result::is_ok), "{what}");
        let held = batch.size_bytes() as usize + size_of_val(&batch.changes[..]);
        assert!(held <= counted, "{what}: {held} bytes, counted as {counted}");
    }
    // What is small by itself leaves room for others.
    let punch = allocate(from, (0, 16 << 40), AllocateMode::PunchHole);
    let command = Command::Mutate { session: None, numbered: None, work: Work::Operation(punch) };
    assert!(command.size_bytes(65536) < 128 << 10);
}

/// The directory so many levels below one, by the only name in each.
async fn below(world: &World, top: InodeNo, n: &str, levels: usize) -> InodeNo {
    let view = world.view().await;
    (0..levels).fold(top, |at, _| read::lookup(&view, at, n.as_bytes()).unwrap().inode)
}

/// How many directories lie above one.
async fn depth(world: &World, of: InodeNo) -> usize {
    let view = world.view().await;
    let above = |at: &InodeNo| (*at != ROOT).then(|| read::lookup(&view, *at, b"..").unwrap().inode);
    std::iter::successors(Some(of), above).count() - 1
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn renames_cannot_nest_without_bound() {
    let world = World::mem(None, 65536);
    // Three chains of as many directories as a key can have, one in the other.
    let levels = DEPTH_MAX - 1;
    for n in ["a", "b", "c"] {
        world.run(put(&format!("{}{n}v", format!("{n}/").repeat(levels)), b"")).await.unwrap();
    }
    let refused = async |operation| {
        let error = world.run(operation).await.unwrap_err();
        assert_eq!(error.reason(), Reason::NameTooLong, "{error}");
    };
    let deepest = below(&world, ROOT, "a", levels).await;
    world.run(rename(ROOT, "b", deepest, "b")).await.unwrap();
    let bottom = below(&world, deepest, "b", levels).await;
    assert_eq!(depth(&world, bottom).await, 2 * levels);
    // There nothing can be made, nor can all of it go deeper than the limit.
    refused(Operation::MakeDirectory {
        parent: bottom,
        name: name("d"),
        inode: shardfs_proto::types::op::NewInode { mode: 0o755, uid: 1, gid: 2, unmasked_mode: None },
    })
    .await;
    for far in [3, 10, levels] {
        let place = below(&world, ROOT, "c", far).await;
        refused(rename(ROOT, "a", place, "a")).await;
    }
    // As far as it fits it goes, and from there up; never further, in whatever steps.
    let place = below(&world, ROOT, "c", 1).await;
    world.run(rename(ROOT, "a", place, "a")).await.unwrap();
    assert!(depth(&world, bottom).await <= MOVED_DEPTH_MAX);
    let top = world.mkdir(ROOT, "top").await.inode;
    let sub = world.mkdir(top, "sub").await.inode;
    let lower = world.mkdir(sub, "lower").await.inode;
    refused(rename(ROOT, "c", lower, "c")).await;
    refused(rename(place, "a", lower, "a")).await;
    world.run(rename(place, "a", ROOT, "a")).await.unwrap();
    refused(Operation::Rename {
        parent: ROOT,
        name: name("a"),
        new_parent: lower,
        new_name: name("x"),
        no_replace: false,
        exchange: false,
    })
    .await;
    // An exchange is two moves.
    let x = world.mkdir(lower, "x").await.inode;
    world.mkdir(x, "y").await;
    refused(Operation::Rename {
        parent: ROOT,
        name: name("a"),
        new_parent: lower,
        new_name: name("x"),
        no_replace: false,
        exchange: true,
    })
    .await;
    refused(Operation::Rename {
        parent: lower,
        name: name("x"),
        new_parent: ROOT,
        new_name: name("a"),
        no_replace: false,
        exchange: true,
    })
    .await;
    // Ordinary trees are moved about as often as one likes.
    for _ in 0..3 * DEPTH_MAX {
        world.run(rename(ROOT, "top", place, "top")).await.unwrap();
        world.run(rename(place, "top", ROOT, "top")).await.unwrap();
    }
    world.check("deep").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_grows_after_it_was_moved_up_is_known_to_be_deep() {
    let world = World::mem(None, 65536);
    let levels = DEPTH_MAX - 1;
    for n in ["a", "b"] {
        world.run(put(&format!("{}{n}v", format!("{n}/").repeat(levels)), b"")).await.unwrap();
    }
    let deepest = below(&world, ROOT, "a", levels).await;
    let place = below(&world, ROOT, "a", levels - 1).await;
    // Made where hardly anything fits below it, then moved to where much does.
    let m = world.mkdir(place, "m").await.inode;
    let inner = world.mkdir(m, "n").await.inode;
    world.run(rename(place, "m", ROOT, "m")).await.unwrap();
    let mut at = inner;
    for _ in 0..100 {
        at = world.mkdir(at, "n").await.inode;
    }
    world.run(rename(ROOT, "b", at, "b")).await.unwrap();
    // 2 + 100 + 2047 levels in it: too many to go to the bottom of the other chain.
    let error = world.run(rename(ROOT, "m", deepest, "m")).await.unwrap_err();
    assert_eq!(error.reason(), Reason::NameTooLong);
    let place = below(&world, ROOT, "a", 1000).await;
    world.run(rename(ROOT, "m", place, "m")).await.unwrap();
    world.check("grown").await;
}
