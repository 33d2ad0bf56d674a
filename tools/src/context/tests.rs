//! Precedence of flags, environment, config file and folders.

use super::*;
use crate::devcluster::state::{Settings, VolumeKind};

fn dev_cluster(dir: &Path, client_id: &str) -> PathBuf {
    let dir = dir.join(DEV_FOLDER);
    let layout = Layout::new(&dir);
    let settings = Settings {
        etcd: None,
        nodes: 2,
        volumes: VolumeKind::Dir,
        volume_size_bytes: 1 << 30,
        volumes_per_node: 1,
        client_id: ClientId::new(client_id).unwrap(),
        mount: None,
        default_limit_bytes: None,
        sockets: PathBuf::from("/run/x"),
        ports: Default::default(),
        mount_options: Vec::new(),
        mount_that_worked: None,
    };
    layout.create().unwrap();
    layout.write_settings(&settings).unwrap();
    dir
}

fn endpoints(context: &Context) -> Vec<String> {
    context.cluster().unwrap().endpoints
}

#[test]
fn order_of_precedence() {
    let temp = tempfile::tempdir().unwrap();
    let dir = dev_cluster(temp.path(), "tenant-a");
    let config = temp.path().join("config.yaml");
    std::fs::write(&config, "endpoints: [from-config:1]\nclient_id: tenant-c\ndeadline_seconds: 5\n")
        .unwrap();
    let below = temp.path().join("a/b");
    std::fs::create_dir_all(&below).unwrap();

    let mut globals = Globals { endpoints: vec!["flag:1".into(), "unix:/s".into()], ..Globals::default() };
    let mut environment = Environment {
        endpoints: Some("env:1,http://env:2".into()),
        dir: Some(dir.clone()),
        client_id: Some("tenant-e".into()),
        deadline: None,
        config: None,
        config_candidates: vec![temp.path().join("absent.yaml"), config],
        working_directory: below,
    };
    let context = |g: &Globals, e: &Environment| Context::new(g.clone(), e.clone());

    let found = context(&globals, &environment).cluster().unwrap();
    assert_eq!(found.endpoints, ["http://flag:1", "unix:/s"]);
    assert_eq!(found.client_id.as_str(), "tenant-e");
    assert_eq!(found.deadline, Duration::from_secs(5));

    globals.endpoints.clear();
    globals.dir = Some(dir.clone());
    globals.client_id = Some(ClientId::new("tenant-f").unwrap());
    let found = context(&globals, &environment).cluster().unwrap();
    assert_eq!(found.endpoints, ["unix:/run/x/node-1.sock", "unix:/run/x/node-2.sock"]);
    assert_eq!((found.client_id.as_str(), found.dir), ("tenant-f", Some(dir)));

    globals = Globals::default();
    assert_eq!(endpoints(&context(&globals, &environment)), ["http://env:1", "http://env:2"]);
    environment.endpoints = None;
    assert_eq!(endpoints(&context(&globals, &environment))[0], "unix:/run/x/node-1.sock");
    environment.dir = None;
    environment.client_id = None;
    let found = context(&globals, &environment).cluster().unwrap();
    assert_eq!(found.endpoints, ["http://from-config:1"]);
    assert_eq!(found.client_id.as_str(), "tenant-c");
    environment.config_candidates.clear();
    let found = context(&globals, &environment).cluster().unwrap();
    assert_eq!(found.endpoints[0], "unix:/run/x/node-1.sock");
    assert_eq!(found.client_id.as_str(), "tenant-a");

    environment.working_directory = PathBuf::from("/");
    let failure = context(&globals, &environment).cluster().unwrap_err();
    assert_eq!((failure.message(), failure.code()), ("no cluster given", crate::failure::EXIT_USAGE));
}

#[test]
fn the_deadline_is_that_of_flag_environment_file() {
    let temp = tempfile::tempdir().unwrap();
    let config = temp.path().join("c.yaml");
    let deadline = |flag: Option<Duration>, variable: Option<&str>, file: &str| {
        std::fs::write(&config, format!("endpoints: [a:1]\n{file}\n")).unwrap();
        let globals = Globals { config: Some(config.clone()), deadline: flag, ..Globals::default() };
        let deadline = variable.map(str::to_owned);
        Context::new(globals, Environment { deadline, ..Environment::default() })
            .cluster()
            .map(|c| c.deadline)
    };
    let seconds = Duration::from_secs;
    assert_eq!(deadline(None, None, "").unwrap(), DEFAULT_DEADLINE);
    // Both names; the daemon's file has the shorter one.
    assert_eq!(deadline(None, None, "deadline_seconds: 5").unwrap(), seconds(5));
    assert_eq!(deadline(None, None, "deadline: 6").unwrap(), seconds(6));
    assert_eq!(deadline(None, Some("7"), "deadline: 6").unwrap(), seconds(7));
    assert_eq!(deadline(None, Some("0.5"), "").unwrap(), Duration::from_millis(500));
    assert_eq!(deadline(Some(seconds(8)), Some("7"), "deadline: 6").unwrap(), seconds(8));
    for (variable, file, named) in [
        (Some("0"), "", "SHARDFS_DEADLINE"),
        (Some("x"), "", "SHARDFS_DEADLINE"),
        (None, "deadline: -1", "c.yaml"),
    ] {
        let failure = deadline(None, variable, file).unwrap_err();
        assert!(failure.message().contains(named), "{failure}");
        assert_eq!(failure.code(), crate::failure::EXIT_USAGE);
    }
}

#[test]
fn bad_config_is_named() {
    let temp = tempfile::tempdir().unwrap();
    let config = temp.path().join("c.yaml");
    std::fs::write(&config, "endpoint: [a:1]\n").unwrap();
    let globals = Globals { config: Some(config.clone()), ..Globals::default() };
    let failure = Context::new(globals.clone(), Environment::default()).cluster().unwrap_err();
    assert!(failure.message().contains("endpoint"), "{}", failure.message());
    assert_eq!(failure.code(), crate::failure::EXIT_USAGE);
    std::fs::write(&config, "# nothing\n").unwrap();
    let failure = Context::new(globals, Environment::default()).cluster().unwrap_err();
    assert_eq!(failure.message(), "no cluster given");
}

#[test]
fn the_example_config_is_valid() {
    let text = include_str!("../../config.example.yaml");
    let config: Option<ConfigFile> = serde_saphyr::from_str(text).unwrap();
    assert!(config.is_none_or(|c| c.endpoints.is_empty()), "everything in the example is commented out");
    let uncommented: String =
        text.lines().filter_map(|l| l.strip_prefix("#: ")).map(|l| format!("{l}\n")).collect();
    let config: ConfigFile = serde_saphyr::from_str(&uncommented).unwrap();
    assert!(!config.endpoints.is_empty() && config.dir.is_some() && config.client_id.is_some());
    assert!(config.deadline_seconds.is_some());
}

#[test]
fn endpoints_are_checked() {
    assert_eq!(normal_endpoint("h:1").as_deref(), Ok("http://h:1"));
    assert_eq!(normal_endpoint("http://h:1/").as_deref(), Ok("http://h:1"));
    assert_eq!(normal_endpoint("http://[::1]:7").as_deref(), Ok("http://[::1]:7"));
    for bad in ["h", "h:0", "h:x", ":1", "unix:rel", "https://h:1", "http://h:1/p"] {
        assert!(normal_endpoint(bad).is_err(), "{bad}");
    }
}
