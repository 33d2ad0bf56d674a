//! Reports made by hand as NVMe 1.4 and 2.0 lay them out, and registering with a device that does as NVMe says.

use std::cell::RefCell;
use std::collections::BTreeMap;

use super::super::WRITE_EXCLUSIVE;
use super::*;

const A: u64 = 0xA1A2_A3A4_A5A6_A7A8;
const B: u64 = 0xB1B2_B3B4_B5B6_B7B8;

/// An entry: controller, status, key; its host's identifier is made of the controller's number.
type Entry = (u16, u8, u64);

fn basic(kind: u8, entries: &[Entry]) -> Vec<u8> {
    let mut bytes = vec![0x2A, 0, 0, 0, kind, entries.len() as u8, 0, 0, 0, 1];
    bytes.resize(24, 0);
    for (controller, status, key) in entries {
        bytes.extend(controller.to_le_bytes());
        bytes.extend([*status, 0, 0, 0, 0, 0]);
        bytes.extend([*controller as u8; 8]);
        bytes.extend(key.to_le_bytes());
    }
    bytes
}

fn extended(kind: u8, entries: &[Entry]) -> Vec<u8> {
    let mut bytes = vec![0x2A, 0, 0, 0, kind, entries.len() as u8, 0, 0, 0, 1];
    bytes.resize(64, 0);
    for (controller, status, key) in entries {
        bytes.extend(controller.to_le_bytes());
        bytes.extend([*status, 0, 0, 0, 0, 0]);
        bytes.extend(key.to_le_bytes());
        bytes.extend([*controller as u8; 16]);
        bytes.extend([0; 32]);
    }
    bytes
}

#[test]
fn both_layouts_are_read() {
    let entries = [(1, 0, A), (2, 1, B)];
    let expected = Report {
        kind: 1,
        registrants: vec![Registrant { key: A, holds: false }, Registrant { key: B, holds: true }],
    };
    assert_eq!(basic(1, &entries).len(), 24 + 2 * 24);
    assert_eq!(extended(1, &entries).len(), 64 + 2 * 64);
    for (mut bytes, layout) in
        [(basic(1, &entries), Layout::Basic), (extended(1, &entries), Layout::Extended)]
    {
        assert_eq!(parse(&bytes, layout).unwrap(), expected);
        // What comes after the entries means nothing.
        bytes.resize(4096, 0xFF);
        assert_eq!(parse(&bytes, layout).unwrap(), expected);
        assert_eq!(expected.holder(), Ok(Some(Holder { key: B, kind: WRITE_EXCLUSIVE })));
    }
}

#[test]
fn bytes_as_a_device_sends_them_are_read() {
    // Generation 7, Write Exclusive, one controller (1), which holds it, host 0x11, key 0x0123456789ABCDEF.
    #[rustfmt::skip]
    let bytes = [
        7, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        1, 0, 1, 0, 0, 0, 0, 0, 0x11, 0, 0, 0, 0, 0, 0, 0, 0xEF, 0xCD, 0xAB, 0x89, 0x67, 0x45, 0x23, 0x01,
    ];
    let report = parse(&bytes, Layout::Basic).unwrap();
    assert_eq!(report.holder(), Ok(Some(Holder { key: 0x0123_4567_89AB_CDEF, kind: 1 })));
}

#[test]
fn nobody_and_none() {
    for layout in [Layout::Basic, Layout::Extended] {
        let nothing = parse(&[0; 64], layout).unwrap();
        assert_eq!((nothing.holder(), nothing.registrants.len()), (Ok(None), 0));
    }
    let registered = parse(&extended(0, &[(1, 0, A), (2, 0, B)]), Layout::Extended).unwrap();
    assert_eq!((registered.holder(), registered.registrants.len()), (Ok(None), 2));
}

#[test]
fn a_host_of_several_controllers_holds_once() {
    let report = parse(&extended(1, &[(1, 1, A), (2, 1, A), (3, 0, B)]), Layout::Extended).unwrap();
    assert_eq!(report.holder(), Ok(Some(Holder { key: A, kind: 1 })));
    // Every registrant holds these; whichever is named, it is no Write Exclusive.
    let report = parse(&extended(5, &[(1, 1, A), (2, 1, B)]), Layout::Extended).unwrap();
    assert_eq!(report.holder(), Ok(Some(Holder { key: A, kind: 5 })));
}

#[test]
fn contradictions_are_errors() {
    for (kind, entries) in [
        (1, vec![(1, 1, A), (2, 1, B)]),
        (1, vec![(1, 0, A)]),
        (1, vec![]),
        (0, vec![(1, 1, A)]),
        (1, vec![(1, 1, 0)]),
        // Reserved bits are no holder's.
        (1, vec![(1, 0xFE, A)]),
    ] {
        let report = parse(&extended(kind, &entries), Layout::Extended).unwrap();
        assert!(report.holder().is_err(), "{kind} {entries:?}");
    }
    assert_eq!(parse(&extended(7, &[]), Layout::Extended), Err(Unread::Type(7)));
}

#[test]
fn whatever_is_cut_off_is_an_error() {
    let entries = [(1, 1, A), (2, 0, B), (3, 0, A)];
    for (bytes, layout) in [(basic(1, &entries), Layout::Basic), (extended(1, &entries), Layout::Extended)] {
        for length in 0..bytes.len() {
            let expected = if length < layout.header_bytes() {
                Unread::NoHeader { bytes: length }
            } else {
                Unread::Cut { needed: bytes.len() }
            };
            assert_eq!(parse(&bytes[..length], layout), Err(expected), "{length}");
        }
        let mut lying = bytes.clone();
        lying[5..7].copy_from_slice(&[0xFF, 0xFF]);
        assert!(matches!(parse(&lying, layout), Err(Unread::Cut { .. })));
    }
}

#[test]
fn any_bytes_are_survived() {
    for round in 0..2000 {
        let mut random = fastrand::Rng::with_seed(round);
        let bytes: Vec<u8> = (0..random.usize(..400)).map(|_| random.u8(..)).collect();
        for layout in [Layout::Basic, Layout::Extended] {
            if let Ok(report) = parse(&bytes, layout) {
                let _any = report.holder();
            }
        }
    }
}

/// A device that registers hosts as NVMe says; this one is host 0.
#[derive(Default)]
struct Target {
    registered: RefCell<BTreeMap<u16, u64>>,
    holder: Option<u16>,
    /// Its hosts have identifiers of 64 bits.
    short_ids: bool,
    /// It keeps nothing through power loss, and refuses to be asked for it.
    forgets: bool,
    /// It has no reservations.
    plain: bool,
    /// Entries that it says it has, beyond those that it has.
    boasts: u16,
    sent: RefCell<Vec<(u8, u32, usize)>>,
}

const HOST: u16 = 0;
const DNR: u16 = 0x4000;

impl Sender for Target {
    fn send(&self, command: IoCommand, data: &mut [u8]) -> std::io::Result<Status> {
        self.sent.borrow_mut().push((command.opcode, command.cdw10, data.len()));
        let code = match command.opcode {
            _any if self.plain => Status::INVALID_OPCODE,
            RESERVATION_REGISTER => self.register(command, data),
            RESERVATION_REPORT => self.report(command, data),
            other => panic!("{other}"),
        };
        Ok(Status::new(if code == 0 { 0 } else { code | DNR }))
    }
}

impl Target {
    fn register(&self, command: IoCommand, data: &[u8]) -> u16 {
        assert_eq!(data.len(), 16);
        let key = u64::from_le_bytes(data[8..].try_into().unwrap());
        if self.forgets && command.cdw10 >> 30 == 3 {
            return Status::INVALID_FIELD;
        }
        let mut registered = self.registered.borrow_mut();
        let own = registered.get(&HOST).copied();
        let ignores = command.cdw10 & 8 != 0;
        match (command.cdw10 & 7, own) {
            (0, _) if key == 0 => return Status::INVALID_FIELD,
            (0, Some(other)) if other != key => return Status::CONFLICT,
            (0, _) => drop(registered.insert(HOST, key)),
            (1 | 2, None) => return Status::CONFLICT,
            (1 | 2, Some(_)) if !ignores => return Status::CONFLICT,
            (1, Some(_)) => drop(registered.remove(&HOST)),
            (2, Some(_)) => drop(registered.insert(HOST, key)),
            other => panic!("{other:?}"),
        }
        0
    }

    fn report(&self, command: IoCommand, data: &mut [u8]) -> u16 {
        assert_eq!((command.cdw10 as usize + 1) * 4, data.len());
        if self.short_ids == (command.cdw11 == EXTENDED) {
            return Status::HOST_ID_FORMAT;
        }
        let entries: Vec<Entry> = self
            .registered
            .borrow()
            .iter()
            .map(|(host, key)| (*host, u8::from(self.holder == Some(*host)), *key))
            .collect();
        let kind = u8::from(self.holder.is_some());
        let mut bytes = if self.short_ids { basic(kind, &entries) } else { extended(kind, &entries) };
        let count = entries.len() as u16 + self.boasts;
        bytes[5..7].copy_from_slice(&count.to_le_bytes());
        bytes.resize(bytes.len().max(data.len()), 0);
        data.copy_from_slice(&bytes[..data.len()]);
        0
    }

    fn of(hosts: u16) -> Target {
        let target = Target::default();
        target.registered.borrow_mut().extend((0..hosts).map(|host| (host, 0x1000 + u64::from(host))));
        target
    }

    fn own(&self) -> Option<u64> {
        self.registered.borrow().get(&HOST).copied()
    }
}

#[test]
fn a_host_registers_whatever_key_it_has() {
    for forgets in [false, true] {
        let target = Target { forgets, ..Target::default() };
        for key in [A, A, B, A] {
            register(&target, key).unwrap();
            assert_eq!(target.own(), Some(key));
        }
        register(&target, 0).unwrap();
        assert_eq!(target.own(), None);
        assert_eq!(register(&target, 0), Err(Refusal::Conflict));
        register(&target, B).unwrap();
        assert_eq!(target.own(), Some(B));
    }
    // The first is asked to persist.
    let target = Target::default();
    register(&target, A).unwrap();
    assert_eq!(*target.sent.borrow(), [(0x0D, 0xC000_0000, 16)]);
    register(&target, B).unwrap();
    assert_eq!(target.sent.borrow()[2], (0x0D, 0xC000_000A, 16));
    register(&target, 0).unwrap();
    assert_eq!(target.sent.borrow()[3], (0x0D, 9, 16));
}

/// Conflicts whatever is sent.
struct Refusing(u16, std::cell::Cell<u32>);

impl Sender for Refusing {
    fn send(&self, _command: IoCommand, _data: &mut [u8]) -> std::io::Result<Status> {
        self.1.set(self.1.get() + 1);
        Ok(Status::new(self.0))
    }
}

#[test]
fn what_is_refused_for_ever_ends() {
    let target = Refusing(0x4083, Default::default());
    assert_eq!(register(&target, A), Err(Refusal::Conflict));
    assert_eq!(target.1.get(), 2 * REGISTER_ROUNDS_MAX);
    assert!(matches!(register(&Refusing(0x2007, Default::default()), A), Err(Refusal::Passing(_))));
    assert!(matches!(register(&Refusing(0x4006, Default::default()), A), Err(Refusal::Failed(_))));
    assert!(matches!(register(&Refusing(0x4002, Default::default()), A), Err(Refusal::Failed(_))));
    assert!(matches!(holder(&Refusing(0x4018, Default::default())), Err(Refusal::Failed(_))));
}

#[test]
fn reports_are_asked_for_in_the_layout_that_fits() {
    for short_ids in [false, true] {
        let mut target = Target { short_ids, ..Target::of(3) };
        assert_eq!(holder(&target), Ok(None));
        target.holder = Some(2);
        assert_eq!(holder(&target), Ok(Some(Holder { key: 0x1002, kind: WRITE_EXCLUSIVE })));
        assert_eq!(keys(&target), Ok(vec![0x1000, 0x1001, 0x1002]));
    }
    let plain = Target { plain: true, ..Target::default() };
    assert!(matches!(holder(&plain), Err(Refusal::Unsupported(_))));
    assert!(matches!(register(&plain, A), Err(Refusal::Unsupported(_))));
}

#[test]
fn a_long_report_is_read_again_and_one_that_is_too_long_is_an_error() {
    let long = Target { holder: Some(99), ..Target::of(100) };
    assert_eq!(holder(&long), Ok(Some(Holder { key: 0x1000 + 99, kind: WRITE_EXCLUSIVE })));
    let sizes: Vec<usize> = long.sent.borrow().iter().map(|sent| sent.2).collect();
    assert_eq!(sizes, [REPORT_BYTES_FIRST, 64 + 100 * 64]);
    let boasting = Target { boasts: 60_000, ..Target::of(1) };
    let Err(Refusal::Failed(why)) = keys(&boasting) else { panic!() };
    assert!(why.contains("too many"), "{why}");
    // Entries that are all zeros are nobody's.
    let boasting = Target { boasts: 3, ..Target::of(1) };
    assert_eq!(keys(&boasting), Ok(vec![0x1000]));
}

/// Has one more entry whenever it is asked.
struct Growing(std::cell::Cell<u16>);

impl Sender for Growing {
    fn send(&self, _command: IoCommand, data: &mut [u8]) -> std::io::Result<Status> {
        self.0.set(self.0.get() + 1);
        data[5..7].copy_from_slice(&self.0.get().to_le_bytes());
        Ok(Status::new(0))
    }
}

#[test]
fn a_report_that_grows_for_ever_ends() {
    assert!(matches!(keys(&Growing(100.into())), Err(Refusal::Passing(_))));
}
