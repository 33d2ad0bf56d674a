//! POSIX access control lists: what Linux keeps in extended attributes, and what it does with them.
//!
//! Invariant: an [`Acl`] is one that `acl_valid(3)` and the kernel take: one entry each for the owner, the group and
//! the others, named users and groups between them, and a mask if there are any of those.
//!
//! The kernel checks permissions; here is what changes lists and permission bits together, with the results of
//! `fs/posix_acl.c`.

use bytes::{BufMut, Bytes, BytesMut};

use super::error::{Error, Reason, Result};
use super::limits::ACL_BYTES_MAX;

/// The attribute that says who may do what with an inode.
pub const ACCESS_ACL: &[u8] = b"system.posix_acl_access";
/// The attribute of a directory that says what is made in it begins with.
pub const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";

/// Read, write, execute of owner, group and others.
pub const PERMISSION_BITS: u32 = 0o777;

/// Version of the attributes' format.
const FORMAT: u32 = 2;
const HEADER_BYTES: usize = 4;
const ENTRY_BYTES: usize = 8;
/// The id of an entry that names nobody.
const NO_ID: u32 = u32::MAX;

/// Whom an entry is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Subject {
    /// The inode's owner.
    Owner,
    /// A user by id.
    User(u32),
    /// The inode's group.
    OwningGroup,
    /// A group by id.
    Group(u32),
    /// A bound on what everybody but the owner and the others gets.
    Mask,
    /// Everybody else.
    Other,
}

/// One entry of a list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AclEntry {
    /// For whom.
    pub subject: Subject,
    /// Read 4, write 2, execute 1.
    pub permissions: u8,
}

/// An access control list.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Acl {
    entries: Vec<AclEntry>,
}

impl Acl {
    /// A list of these entries, in the order that the kernel keeps.
    pub fn new(entries: Vec<AclEntry>) -> Result<Acl> {
        let acl = Acl { entries };
        acl.check()?;
        Ok(acl)
    }

    /// Of an attribute's value. `None`: a list without entries, which stands for no list.
    pub fn decode(value: &[u8]) -> Result<Option<Acl>> {
        let Some((version, entries)) = value.split_first_chunk::<HEADER_BYTES>() else {
            return Err(invalid("it is too short"));
        };
        if value.len() > ACL_BYTES_MAX {
            return Err(Error::new(
                Reason::AttributeTooLarge,
                format!("an access control list has {} bytes; the limit is {ACL_BYTES_MAX}", value.len()),
            ));
        }
        let version = u32::from_le_bytes(*version);
        if version != FORMAT {
            return Err(Error::new(
                Reason::Unsupported,
                format!("an access control list has version {version}, not {FORMAT}"),
            ));
        }
        let (entries, rest) = entries.as_chunks::<ENTRY_BYTES>();
        if !rest.is_empty() {
            return Err(invalid("it ends within an entry"));
        }
        if entries.is_empty() {
            return Ok(None);
        }
        let entries = entries.iter().map(decode_entry).collect::<Result<_>>()?;
        Acl::new(entries).map(Some)
    }

    /// As an attribute's value.
    pub fn encode(&self) -> Bytes {
        let mut value = BytesMut::with_capacity(HEADER_BYTES + ENTRY_BYTES * self.entries.len());
        value.put_u32_le(FORMAT);
        for entry in &self.entries {
            let (tag, id) = match entry.subject {
                Subject::Owner => (tag::USER_OBJ, NO_ID),
                Subject::User(id) => (tag::USER, id),
                Subject::OwningGroup => (tag::GROUP_OBJ, NO_ID),
                Subject::Group(id) => (tag::GROUP, id),
                Subject::Mask => (tag::MASK, NO_ID),
                Subject::Other => (tag::OTHER, NO_ID),
            };
            value.put_u16_le(tag);
            value.put_u16_le(entry.permissions.into());
            value.put_u32_le(id);
        }
        value.freeze()
    }

    /// Its entries.
    pub fn entries(&self) -> &[AclEntry] {
        &self.entries
    }

    /// The permission bits of an inode that has it: the group's are the mask's, if there is one.
    pub fn mode(&self) -> u32 {
        let of = |wanted: Subject| {
            let entry = self.entries.iter().find(|entry| entry.subject == wanted);
            entry.map(|entry| u32::from(entry.permissions))
        };
        let group = of(Subject::Mask).or_else(|| of(Subject::OwningGroup));
        (of(Subject::Owner).unwrap_or(0) << 6) | (group.unwrap_or(0) << 3) | of(Subject::Other).unwrap_or(0)
    }

    /// Whether it says nothing that permission bits do not say.
    pub fn is_mode(&self) -> bool {
        self.entries.iter().all(|entry| match entry.subject {
            Subject::Owner | Subject::OwningGroup | Subject::Other => true,
            Subject::User(_) | Subject::Group(_) | Subject::Mask => false,
        })
    }

    /// Follows a chmod: [`Self::mode`] is that of `mode` then.
    pub fn set_mode(&mut self, mode: u32) {
        self.change(|_, bits| bits, mode);
    }

    /// Makes a directory's default list that of an inode that is made in it and asked for with `mode`; answers the
    /// inode's mode. Neither gives anything that the other does not.
    pub fn restrict(&mut self, mode: u32) -> u32 {
        self.change(|permissions, bits| permissions & bits, mode);
        (mode & !PERMISSION_BITS) | self.mode()
    }

    /// Changes the entries that permission bits stand for: each from what it is and its three bits of `mode`.
    fn change(&mut self, new: impl Fn(u8, u8) -> u8, mode: u32) {
        let masked = self.entries.iter().any(|entry| entry.subject == Subject::Mask);
        let bits = |shift: u32| ((mode >> shift) & 0o7) as u8;
        for entry in &mut self.entries {
            let bits = match entry.subject {
                Subject::Owner => bits(6),
                Subject::Mask => bits(3),
                Subject::OwningGroup if !masked => bits(3),
                Subject::Other => bits(0),
                Subject::User(_) | Subject::Group(_) | Subject::OwningGroup => continue,
            };
            entry.permissions = new(entry.permissions, bits);
        }
    }

    /// As `posix_acl_valid`.
    fn check(&self) -> Result<()> {
        /// What may come next.
        #[derive(PartialEq, Eq)]
        enum Next {
            Owner,
            Users,
            Groups,
            Other,
            End,
        }
        let mut next = Next::Owner;
        let mut named = false;
        for entry in &self.entries {
            if entry.permissions & !0o7 != 0 {
                return Err(invalid("it has permissions that there are not"));
            }
            next = match (entry.subject, next) {
                (Subject::Owner, Next::Owner) => Next::Users,
                (Subject::User(id), Next::Users) if id != NO_ID => {
                    named = true;
                    Next::Users
                }
                (Subject::OwningGroup, Next::Users) => Next::Groups,
                (Subject::Group(id), Next::Groups) if id != NO_ID => {
                    named = true;
                    Next::Groups
                }
                (Subject::Mask, Next::Groups) => Next::Other,
                (Subject::Other, Next::Other) => Next::End,
                (Subject::Other, Next::Groups) if !named => Next::End,
                _ => return Err(invalid("an entry is missing, in the wrong place or there twice")),
            };
        }
        if next == Next::End { Ok(()) } else { Err(invalid("its last entries are missing")) }
    }
}

/// The kernel's numbers.
mod tag {
    pub(super) const USER_OBJ: u16 = 0x01;
    pub(super) const USER: u16 = 0x02;
    pub(super) const GROUP_OBJ: u16 = 0x04;
    pub(super) const GROUP: u16 = 0x08;
    pub(super) const MASK: u16 = 0x10;
    pub(super) const OTHER: u16 = 0x20;
}

fn decode_entry(bytes: &[u8; ENTRY_BYTES]) -> Result<AclEntry> {
    let [t0, t1, p0, p1, i0, i1, i2, i3] = *bytes;
    let id = u32::from_le_bytes([i0, i1, i2, i3]);
    let subject = match u16::from_le_bytes([t0, t1]) {
        tag::USER_OBJ => Subject::Owner,
        tag::USER => Subject::User(id),
        tag::GROUP_OBJ => Subject::OwningGroup,
        tag::GROUP => Subject::Group(id),
        tag::MASK => Subject::Mask,
        tag::OTHER => Subject::Other,
        _ => return Err(invalid("it has an entry of an unknown kind")),
    };
    let permissions = u16::from_le_bytes([p0, p1]);
    let permissions =
        u8::try_from(permissions).map_err(|_| invalid("it has permissions that there are not"))?;
    Ok(AclEntry { subject, permissions })
}

fn invalid(why: &str) -> Error {
    Error::invalid(format!("no access control list: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(Subject, u8)]) -> Result<Acl> {
        Acl::new(entries.iter().map(|&(subject, permissions)| AclEntry { subject, permissions }).collect())
    }

    fn minimal() -> Acl {
        acl(&[(Subject::Owner, 6), (Subject::OwningGroup, 4), (Subject::Other, 0)]).unwrap()
    }

    fn full() -> Acl {
        acl(&[
            (Subject::Owner, 7),
            (Subject::User(10), 7),
            (Subject::User(11), 4),
            (Subject::OwningGroup, 5),
            (Subject::Group(20), 6),
            (Subject::Mask, 6),
            (Subject::Other, 1),
        ])
        .unwrap()
    }

    fn reason(outcome: Result<impl Sized>) -> Reason {
        outcome.err().expect("should have failed").reason()
    }

    #[test]
    fn the_format_is_the_kernels() {
        let named = acl(&[
            (Subject::Owner, 6),
            (Subject::User(1000), 4),
            (Subject::OwningGroup, 4),
            (Subject::Mask, 4),
            (Subject::Other, 0),
        ])
        .unwrap();
        // What `setfacl -m u:1000:r` stores for a file of mode 0640.
        let stored: &[u8] = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\xe8\x03\0\0\
            \x04\0\x04\0\xff\xff\xff\xff\x10\0\x04\0\xff\xff\xff\xff\x20\0\0\0\xff\xff\xff\xff";
        assert_eq!(named.encode(), stored);
        assert_eq!(Acl::decode(stored).unwrap(), Some(named));
        for acl in [minimal(), full()] {
            assert_eq!(Acl::decode(&acl.encode()).unwrap(), Some(acl));
        }
        // Whatever stands for the id of an entry that names nobody.
        let mut odd = minimal().encode().to_vec();
        odd[8..12].fill(7);
        assert_eq!(Acl::decode(&odd).unwrap(), Some(minimal()));
    }

    #[test]
    fn a_list_without_entries_is_none() {
        assert_eq!(Acl::decode(&[2, 0, 0, 0]).unwrap(), None);
    }

    #[test]
    fn other_bytes_are_no_list() {
        assert_eq!(reason(Acl::decode(b"")), Reason::InvalidArgument);
        assert_eq!(reason(Acl::decode(&[2, 0, 0])), Reason::InvalidArgument);
        assert_eq!(reason(Acl::decode(&[1, 0, 0, 0])), Reason::Unsupported);
        let good = full().encode();
        for length in HEADER_BYTES + 1..good.len() {
            assert_eq!(reason(Acl::decode(&good[..length])), Reason::InvalidArgument, "{length} bytes");
        }
        let with = |at: usize, byte: u8| {
            let mut bytes = good.to_vec();
            bytes[at] = byte;
            reason(Acl::decode(&bytes))
        };
        assert_eq!(with(4, 0x40), Reason::InvalidArgument, "a kind of entry");
        assert_eq!(with(6, 8), Reason::InvalidArgument, "a permission");
        assert_eq!(with(7, 1), Reason::InvalidArgument, "a permission beyond a byte");
        let long = [&[2, 0, 0, 0][..], &vec![0; ACL_BYTES_MAX]].concat();
        assert_eq!(reason(Acl::decode(&long)), Reason::AttributeTooLarge);
    }

    #[test]
    fn entries_stand_in_order_and_are_all_there() {
        use Subject::{Group, Mask, Other, Owner, OwningGroup, User};
        let good: [&[Subject]; 4] = [
            &[Owner, OwningGroup, Other],
            &[Owner, OwningGroup, Mask, Other],
            &[Owner, User(1), OwningGroup, Mask, Other],
            &[Owner, User(2), User(1), OwningGroup, Group(1), Group(1), Mask, Other],
        ];
        let of = |subjects: &[Subject]| acl(&subjects.iter().map(|&s| (s, 4)).collect::<Vec<_>>());
        for subjects in good {
            assert!(of(subjects).is_ok(), "{subjects:?}");
        }
        let bad: [&[Subject]; 11] = [
            &[],
            &[Owner],
            &[Owner, OwningGroup],
            &[OwningGroup, Other],
            &[Owner, Other],
            &[Owner, User(1), OwningGroup, Other],
            &[Owner, OwningGroup, Group(1), Other],
            &[Owner, OwningGroup, User(1), Mask, Other],
            &[Owner, Owner, OwningGroup, Other],
            &[Owner, OwningGroup, Other, Other],
            &[Owner, User(NO_ID), OwningGroup, Mask, Other],
        ];
        for subjects in bad {
            assert_eq!(reason(of(subjects)), Reason::InvalidArgument, "{subjects:?}");
        }
        assert_eq!(reason(acl(&[(Owner, 8), (OwningGroup, 0), (Other, 0)])), Reason::InvalidArgument);
    }

    #[test]
    fn permission_bits_are_those_of_owner_mask_and_others() {
        assert_eq!((minimal().mode(), minimal().is_mode()), (0o640, true));
        assert_eq!((full().mode(), full().is_mode()), (0o761, false));
        let masked =
            acl(&[(Subject::Owner, 7), (Subject::OwningGroup, 7), (Subject::Mask, 1), (Subject::Other, 0)]);
        assert_eq!((masked.clone().unwrap().mode(), masked.unwrap().is_mode()), (0o710, false));
    }

    #[test]
    fn chmod_changes_the_mask_and_not_the_group_if_there_is_one() {
        let mut acl = full();
        acl.set_mode(0o4650);
        assert_eq!(acl.mode(), 0o650);
        let of = |wanted: Subject| acl.entries.iter().find(|e| e.subject == wanted).unwrap().permissions;
        assert_eq!((of(Subject::OwningGroup), of(Subject::Mask), of(Subject::User(10))), (5, 5, 7));
        let mut acl = minimal();
        acl.set_mode(0o751);
        assert_eq!(acl.mode(), 0o751);
        for mode in 0..=PERMISSION_BITS {
            for mut acl in [minimal(), full()] {
                acl.set_mode(mode);
                assert_eq!(acl.mode(), mode);
            }
        }
    }

    #[test]
    fn what_is_made_gets_no_more_than_asked_and_no_more_than_the_default() {
        for mode in 0..=0o7777 {
            for default in [minimal(), full()] {
                let mut acl = default.clone();
                let made = acl.restrict(mode);
                assert_eq!(made, (mode & !PERMISSION_BITS) | (mode & default.mode()), "{mode:o}");
                assert_eq!(acl.mode(), made & PERMISSION_BITS);
                assert_eq!(acl.is_mode(), default.is_mode());
            }
        }
        let mut acl = full();
        acl.restrict(0o600);
        let of = |wanted: Subject| acl.entries.iter().find(|e| e.subject == wanted).unwrap().permissions;
        assert_eq!((of(Subject::OwningGroup), of(Subject::Mask), of(Subject::Group(20))), (5, 0, 6));
    }
}
