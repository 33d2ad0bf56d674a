//! Precedence and checks of settings.

use clap::{CommandFactory, Parser};

use super::*;

const EXAMPLE: &str = include_str!("../../shardfsd.example.yaml");

fn args(words: &[&str]) -> Args {
    Args::try_parse_from(["shardfsd", "/mnt/x"].iter().chain(words)).unwrap()
}

fn with_file(args: Args, text: &str) -> Result<Settings> {
    let options = options::parse(args.options.iter().map(String::as_str), false)?;
    let mut args = args;
    for (name, value) in &options.settings {
        apply(&mut args, name, value)?;
    }
    resolve(args, parse(text)?, options)
}

/// The example with its settings switched on.
fn example() -> String {
    EXAMPLE.lines().map(|line| line.strip_prefix("#: ").unwrap_or(line)).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_example_is_valid_and_complete() {
    parse(EXAMPLE).unwrap();
    let all = parse(&example()).unwrap();
    let shown = format!("{all:?}");
    assert!(!shown.contains("None"), "the example lacks a setting: {shown}");
    resolve(args(&[]), all, options::parse([], false).unwrap()).unwrap();
}

#[test]
fn every_setting_of_the_file_is_a_flag_a_variable_and_a_mount_option() {
    let command = Args::command();
    let text = example();
    let fields: Vec<&str> =
        text.lines().filter(|l| !l.starts_with('#')).filter_map(|l| Some(l.split_once(": ")?.0)).collect();
    assert_eq!(fields.len(), options::SETTINGS.len() - 1, "all but `config`: {fields:?}");
    for field in fields {
        let arg = command.get_arguments().find(|a| a.get_id().as_str() == field);
        assert!(arg.unwrap_or_else(|| panic!("no flag for {field}")).get_env().is_some(), "{field}");
        assert!(options::SETTINGS.contains(&field), "{field}");
    }
    let mut applied = args(&[]);
    for name in options::SETTINGS {
        let value = match name {
            "readdirplus" => "on",
            "read_from" => "backup",
            "locks" => "local",
            "log_format" => "json",
            _ => "1",
        };
        apply(&mut applied, name, value).unwrap();
    }
}

#[test]
fn options_override_flags_override_the_file_overrides_defaults() {
    let file = "endpoints: [a:1]\nclient_id: from-file\nthreads: 7\nattr_ttl: 2\n";
    let settings = with_file(args(&[]), file).unwrap();
    assert_eq!((settings.client_id.as_str(), settings.threads), ("from-file", 7));
    assert_eq!(settings.endpoints, ["http://a:1"]);
    assert_eq!(settings.attr_ttl, Duration::from_secs(2));
    assert!(settings.readdirplus, "auto, with a time to live");
    assert_eq!(settings.entry_ttl, Duration::ZERO);

    let settings = with_file(args(&["--client-id", "from-flag", "--threads", "2"]), file).unwrap();
    assert_eq!((settings.client_id.as_str(), settings.threads), ("from-flag", 2));

    let words = ["--client-id", "from-flag", "-o", "client_id=from-option,ro,endpoints=b:2;unix:/s"];
    let settings = with_file(args(&words), file).unwrap();
    assert_eq!(settings.client_id.as_str(), "from-option");
    assert_eq!(settings.endpoints, ["http://b:2", "unix:/s"]);
    assert!(settings.flags.contains(MountFlags::RDONLY));
}

#[test]
fn a_source_is_a_list_of_endpoints() {
    let of = |source: &str| {
        let args = Args::try_parse_from(["shardfsd", source, "/mnt/x"]).unwrap();
        with_file(args, "endpoints: [f:9]").map(|s| (s.endpoints, s.mount_point))
    };
    assert_eq!(of("n_1:1,n2:2").unwrap().0, ["http://n_1:1", "http://n2:2"]);
    assert_eq!(of("unix:/run/a.sock").unwrap().0, ["unix:/run/a.sock"]);
    assert_eq!(of("none").unwrap(), (vec!["http://f:9".to_owned()], PathBuf::from("/mnt/x")));
    assert!(of("/dev/sda").is_err());
}

#[test]
fn wrong_settings_are_told_from_other_failures() {
    let load = |words: &[&str]| Settings::load(args(words));
    let refused = load(&["--endpoints", "a:1", "--config", "/nonexistent/shardfsd.yaml"]).unwrap_err();
    assert!(refused.is::<Refused>() && refused.to_string().contains("No such file"), "{refused}");
    assert!(load(&["--endpoints", "a:1", "--threads", "0"]).unwrap_err().is::<Refused>());
    assert!(load(&["--endpoints", "a:1"]).is_ok());
}

#[test]
fn the_kernel_is_told_the_source_that_was_given() {
    let of = |words: &[&str]| {
        let args = Args::try_parse_from(["shardfsd"].iter().chain(words)).unwrap();
        with_file(args, "endpoints: [f:9]").unwrap().source
    };
    assert_eq!(of(&["/mnt/x"]), "shardfs");
    assert_eq!(of(&["n1:1,n2:2", "/mnt/x"]), "n1:1,n2:2");
    assert_eq!(of(&["none", "/mnt/x"]), "none");
    assert_eq!(of(&["n1:1", "/mnt/x", "-o", "fsname=mine"]), "mine");
}

#[test]
fn mistakes_are_explained() {
    let good = ["--endpoints", "a:1"];
    let cases: &[(&[&str], &str)] = &[
        (&[], "no node is given"),
        (&["--endpoints", "a"], "HOST:PORT"),
        (&["--endpoints", "a:0"], "HOST:PORT"),
        (&["--endpoints", "unix:x"], "absolute"),
        (&["--client-id", "a b"], "client id"),
        (&["--root-mode", "9"], "octal"),
        (&["--threads", "0"], "1 to 64"),
        (&["-o", "attr_ttl=-1"], "attr-ttl"),
        (&["--deadline", "0"], "deadline"),
        (&["--deadline", "1e9"], "deadline"),
        (&["-o", "deadline=long"], "or `hard`"),
        (&["--http", "here"], "IP:PORT"),
        (&["-o", "readdirplus=maybe"], "auto, on, off"),
        (&["-o", "threads=x"], "number"),
        (&["-o", "locks=no"], "shared, local"),
    ];
    for (words, expected) in cases {
        let given = words.is_empty() || words.contains(&"--endpoints");
        let all = if given { words.to_vec() } else { [&good[..], words].concat() };
        let parsed = args(&all);
        let error = format!("{:#}", with_file(parsed, "").unwrap_err());
        assert!(error.contains(expected), "{words:?}: {error}");
    }
}

#[test]
fn unknown_fields_are_named() {
    let error = format!("{:#}", parse("endpoint: [a:1]\n").unwrap_err());
    assert!(error.contains("endpoint") && error.contains("endpoints"), "{error}");
}

#[test]
fn reads_from_backups_make_the_mount_read_only() {
    let plain = with_file(args(&["--endpoints", "h:1"]), "").unwrap();
    assert_eq!(plain.reads, ReadFrom::Primary);
    assert!(!plain.flags.contains(MountFlags::RDONLY));
    let stale = with_file(args(&["--endpoints", "h:1", "--read-from", "backup", "-o", "rw"]), "").unwrap();
    assert_eq!(stale.reads, ReadFrom::Backup { max_staleness: STALENESS_DEFAULT });
    assert!(stale.flags.contains(MountFlags::RDONLY));
    let option =
        with_file(args(&["--endpoints", "h:1", "-o", "read_from=backup,max_staleness=2"]), "").unwrap();
    assert_eq!(option.reads, ReadFrom::Backup { max_staleness: Duration::from_secs(2) });
    let error = with_file(args(&["--endpoints", "h:1", "--max-staleness", "2"]), "").unwrap_err();
    assert!(error.to_string().contains("--read-from backup"), "{error}");
}

#[test]
fn requests_wait_for_a_time_or_for_ever() {
    let of = |words: &[&str], file: &str| {
        with_file(args(&[&["--endpoints", "h:1"], words].concat()), file).unwrap().deadline
    };
    assert_eq!(of(&[], ""), DEADLINE_DEFAULT);
    assert_eq!(of(&[], "deadline: 5"), Duration::from_secs(5));
    assert_eq!(of(&[], "deadline: 2.5"), Duration::from_millis(2500));
    assert_eq!(of(&[], "deadline: hard"), DEADLINE_NEVER);
    assert_eq!(of(&["--deadline", "7"], "deadline: hard"), Duration::from_secs(7));
    assert_eq!(of(&["--deadline", "hard"], "deadline: 5"), DEADLINE_NEVER);
    assert_eq!(of(&["--deadline", "7", "-o", "hard"], ""), DEADLINE_NEVER);
    assert_eq!(of(&["-o", "hard,soft=2"], ""), Duration::from_secs(2));
    assert_eq!(of(&["-o", "soft"], "deadline: hard"), DEADLINE_DEFAULT);
}

#[test]
fn locks_are_shared_unless_the_mount_changes_nothing() {
    let of = |words: &[&str]| {
        with_file(args(&[&["--endpoints", "h:1"], words].concat()), "").map(|settings| settings.posix_locks)
    };
    assert!(of(&[]).unwrap() && of(&["-o", "locks=shared"]).unwrap() && of(&["-o", "ro"]).unwrap());
    assert!(!of(&["-o", "locks=local"]).unwrap() && !of(&["--locks", "local"]).unwrap());
    assert!(!of(&["--read-from", "backup"]).unwrap());
    let error = of(&["--read-from", "backup", "--locks", "shared"]).unwrap_err();
    assert!(error.to_string().contains("--locks shared"), "{error}");
}
