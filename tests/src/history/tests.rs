//! Histories in a few lines, and what may and may not be left of them.

use super::*;

fn put(name: &str, content: &str) -> Change {
    Change::Put(vec![(name.to_owned(), content.as_bytes().to_vec())])
}

fn state(items: &[(&str, &str)]) -> State {
    items.iter().map(|(name, content)| ((*name).to_owned(), content.as_bytes().to_vec())).collect()
}

fn do_it(history: &History, lane: usize, change: Change, durable: bool) {
    let issued = history.issue(lane, change).unwrap();
    history.answered(lane, issued, durable);
}

#[test]
fn changes_do_what_files_do() {
    let mut found = state(&[("a/x", "12345")]);
    Change::Write("a/x".into(), 7, b"89".to_vec()).apply(&mut found);
    assert_eq!(found, state(&[("a/x", "12345\0\089")]));
    Change::Truncate("a/x".into(), 2).apply(&mut found);
    Change::Rename("a/x".into(), "a/y".into()).apply(&mut found);
    assert_eq!(found, state(&[("a/y", "12")]));
    Change::Put(vec![("a/p".into(), b"1".to_vec()), ("a/q".into(), b"2".to_vec())]).apply(&mut found);
    Change::Rename("a/p".into(), "a/q".into()).apply(&mut found);
    Change::Remove("a/y".into()).apply(&mut found);
    assert_eq!(found, state(&[("a/q", "1")]));
}

#[test]
fn every_prefix_since_the_last_sync_is_accepted_and_nothing_else() {
    let history = History::new(&["a"]);
    do_it(&history, 0, put("a/1", "x"), false);
    do_it(&history, 0, put("a/2", "x"), true);
    do_it(&history, 0, put("a/3", "x"), false);
    do_it(&history, 0, Change::Remove("a/1".into()), false);
    let began = history.now();
    let issued = history.issue(0, put("a/4", "x")).unwrap();
    let over = history.now();
    history.answered(0, issued, true);
    do_it(&history, 0, put("a/5", "x"), true);

    let check = |items: &[(&str, &str)]| history.check(&state(items), began, over);
    assert_eq!(check(&[("a/1", "x"), ("a/2", "x")]), Ok(vec![2]));
    assert_eq!(check(&[("a/1", "x"), ("a/2", "x"), ("a/3", "x")]), Ok(vec![3]));
    assert_eq!(check(&[("a/2", "x"), ("a/3", "x")]), Ok(vec![4]));
    assert_eq!(check(&[("a/2", "x"), ("a/3", "x"), ("a/4", "x")]), Ok(vec![5]));
    // A durable one is lost.
    let lost = check(&[("a/1", "x")]).unwrap_err();
    assert!(lost.contains("put a/2") && lost.contains("lost"), "{lost}");
    // One that nobody had asked for yet.
    let early = check(&[("a/2", "x"), ("a/3", "x"), ("a/4", "x"), ("a/5", "x")]).unwrap_err();
    assert!(early.contains("asked for"), "{early}");
    // One in the middle is missing; another content; another name.
    for wrong in [
        &[("a/1", "x"), ("a/2", "x"), ("a/4", "x")][..],
        &[("a/1", "x"), ("a/2", "y")],
        &[("a/1", "x"), ("a/2", "x"), ("a/9", "x")],
    ] {
        let said = check(wrong).unwrap_err();
        assert!(said.contains("no state that it ever had"), "{said}");
    }
    assert!(check(&[("b/1", "x")]).unwrap_err().contains("nobody has made it"));
}

#[test]
fn what_was_answered_before_is_there_with_what_came_after() {
    let history = History::new(&["a", "b"]);
    do_it(&history, 0, put("a/1", "x"), false);
    do_it(&history, 1, put("b/1", "x"), false);
    let (began, over) = (history.now(), history.now());
    let check = |items: &[(&str, &str)]| history.check(&state(items), began, over);
    assert_eq!(check(&[]), Ok(vec![0, 0]));
    assert_eq!(check(&[("a/1", "x")]), Ok(vec![1, 0]));
    assert_eq!(check(&[("a/1", "x"), ("b/1", "x")]), Ok(vec![1, 1]));
    assert!(check(&[("b/1", "x")]).unwrap_err().contains("change 1 of a"));

    // Those that overlap may come in either order.
    let history = History::new(&["a", "b"]);
    let first = history.issue(0, put("a/1", "x")).unwrap();
    let second = history.issue(1, put("b/1", "x")).unwrap();
    history.answered(0, first, false);
    history.answered(1, second, false);
    let now = history.now();
    assert_eq!(history.check(&state(&[("b/1", "x")]), now, now), Ok(vec![0, 1]));
    assert_eq!(history.check(&state(&[("a/1", "x")]), now, now), Ok(vec![1, 0]));
}

#[test]
fn a_sync_of_one_lane_makes_durable_what_others_had_done() {
    let history = History::new(&["a", "b"]);
    do_it(&history, 0, put("a/1", "x"), false);
    let sync = history.now();
    do_it(&history, 0, put("a/2", "x"), false);
    let before = history.now();
    history.synced(sync);
    let after = history.now();
    let one = state(&[("a/1", "x")]);
    // Not acknowledged yet, it promises nothing.
    assert_eq!(history.check(&State::new(), before, after), Ok(vec![0, 0]));
    assert!(history.check(&State::new(), after, after).is_err());
    assert_eq!(history.check(&one, after, after), Ok(vec![1, 0]));
    // A durable change of another lane is a sync as well.
    do_it(&history, 1, put("b/1", "x"), true);
    let now = history.now();
    assert!(history.check(&one, now, now).is_err());
    assert_eq!(history.check(&state(&[("a/1", "x"), ("a/2", "x"), ("b/1", "x")]), now, now), Ok(vec![2, 1]));
}

#[test]
fn a_state_that_was_there_before_is_refused() {
    let history = History::new(&["a"]);
    do_it(&history, 0, put("a/1", "x"), false);
    assert!(history.issue(0, Change::Remove("a/1".into())).is_none());
    assert!(history.issue(0, put("a/1", "x")).is_none());
    do_it(&history, 0, put("a/1", "y"), false);
    assert_eq!(history.last(0), state(&[("a/1", "y")]));
    assert_eq!(history.check_all(&state(&[("a/1", "y")])), Ok(()));
    assert!(history.check_all(&state(&[("a/1", "x")])).unwrap_err().contains("1 of 2"));
}
