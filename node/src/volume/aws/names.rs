//! The names under which an instance has its volumes. On Nitro they name nothing in the system, but EC2 wants them to differ.

use std::collections::BTreeSet;

/// All names that EC2 takes for further volumes, those that it recommends first.
fn all() -> impl Iterator<Item = String> {
    let few = ('f'..='p').map(|letter| format!("/dev/sd{letter}"));
    // EC2 refuses those after xvddx; xvda alone is the root's.
    let many = ['b', 'c', 'd', 'a'].into_iter().flat_map(|first| {
        let last = if first == 'd' { 'x' } else { 'z' };
        ('a'..=last).map(move |second| format!("/dev/xvd{first}{second}"))
    });
    few.chain(many)
}

/// A name that is none of these. `/dev/sdf` and `/dev/xvdf` are the same to EC2.
pub(super) fn free(taken: &BTreeSet<String>) -> Option<String> {
    let taken: BTreeSet<&str> = taken.iter().map(|name| letters(name)).collect();
    all().find(|name| !taken.contains(letters(name)))
}

fn letters(name: &str) -> &str {
    let name = name.strip_prefix("/dev/").unwrap_or(name);
    let name = name.strip_prefix("xvd").or_else(|| name.strip_prefix("sd")).unwrap_or(name);
    name.trim_end_matches(|c: char| c.is_ascii_digit())
}
