//! Tests of what needs no EC2: names of devices, errors, sizes, tokens.

use super::failure::{Class, Failure};
use super::*;

fn answered(code: &str, message: &str) -> Failure {
    Failure::answered("ec2:AttachVolume", 400, code, message)
}

#[test]
fn codes_of_ec2_have_reasons_and_advice() {
    for (code, reason, advice) in [
        ("UnauthorizedOperation", Reason::NotPermitted, "ec2:AttachVolume, or"),
        ("UnauthorizedOperation", Reason::NotPermitted, "deploy/iam-policy.json"),
        ("AuthFailure", Reason::NotPermitted, "credentials are not valid or have expired"),
        ("RequestExpired", Reason::NotPermitted, "clock"),
        ("InvalidClientTokenId", Reason::NotPermitted, "role"),
        ("RequestLimitExceeded", Reason::Unavailable, "repeat"),
        ("InvalidVolume.NotFound", Reason::NotFound, "id"),
        ("InvalidInstanceID.NotFound", Reason::NotFound, "region"),
        ("VolumeLimitExceeded", Reason::Unsupported, "quota"),
        ("MaxIOPSLimitExceeded", Reason::Unsupported, "quota"),
        ("AttachmentLimitExceeded", Reason::Unsupported, "detach another disk"),
        ("VolumeInUse", Reason::Unavailable, "when it is over"),
        ("VolumeModificationRateExceeded", Reason::Unavailable, "hours"),
        ("ConcurrentSnapshotLimitExceeded", Reason::Unavailable, "another snapshot"),
        ("IdempotentParameterMismatch", Reason::InvalidArgument, "another token"),
        ("InvalidParameterValue", Reason::InvalidArgument, "arguments"),
        ("NeverSeen", Reason::InvalidArgument, "NeverSeen"),
    ] {
        let error = Error::from(answered(code, "words of EC2"));
        assert_eq!(error.reason(), reason, "{code}");
        for part in [advice, code, "words of EC2"] {
            assert!(error.message().contains(part), "{code}: {error}");
        }
    }
}

#[test]
fn failures_that_may_pass_are_told_from_those_that_are_certain() {
    for (status, code, class) in [
        (503, "RequestLimitExceeded", Class::Throttled),
        (400, "SnapshotCreationPerVolumeRateExceeded", Class::Throttled),
        (500, "InternalError", Class::Unknown),
        (503, "Unavailable", Class::Unknown),
        (502, "", Class::Unknown),
        (400, "IncorrectState", Class::State),
        (403, "UnauthorizedOperation", Class::Denied),
        (400, "NeverSeen", Class::Refused),
    ] {
        let failure = Failure::answered("ec2:X", status, code, "");
        assert_eq!(failure.class, class, "{status} {code}");
        assert_eq!(failure.passes(), matches!(class, Class::Throttled | Class::Unknown), "{status} {code}");
    }
}

#[test]
fn the_action_that_is_not_allowed_is_that_of_ec2s_message() {
    let message = "You are not authorized to perform this operation. User: arn:aws:sts::1:assumed-role/r/i-1 is not \
                   authorized to perform: ec2:CreateTags on resource: arn:aws:ec2:r:1:volume/*";
    let error = Error::from(Failure::answered("ec2:CreateVolume", 403, "UnauthorizedOperation", message));
    assert!(error.message().contains("does not allow ec2:CreateTags, or"), "{error}");
    let error = Error::from(Failure::answered("ec2:CreateVolume", 403, "UnauthorizedOperation", "No."));
    assert!(error.message().contains("does not allow ec2:CreateVolume, or"), "{error}");
}

#[test]
fn missing_credentials_are_told_from_wrong_ones() {
    let none = Failure::unanswered("ec2:DescribeVolumes", Class::Credentials, "no providers in chain");
    let error = Error::from(none);
    assert_eq!(error.reason(), Reason::NotPermitted);
    assert!(error.message().contains("instance profile"), "{error}");
}

#[test]
fn messages_are_bounded() {
    let failure = answered("X", &"ä".repeat(4000));
    assert!((2000..=2048).contains(&failure.message.len()), "{}", failure.message.len());
}

#[test]
fn what_ec2_says_of_attachments_is_understood() {
    let taken = "Invalid value '/dev/sdf' for unixDevice. Attachment point /dev/sdf is already in use";
    assert!(answered("InvalidParameterValue", taken).is_name_taken());
    assert!(
        !answered("InvalidParameterValue", "Value (/dev/x) for parameter device is invalid.").is_name_taken()
    );
    assert!(!answered("VolumeInUse", "vol-1 is already in use").is_name_taken());
    assert!(answered("IncorrectState", "Volume 'vol-1' is in the 'available' state.").is_not_attached());
    assert!(!answered("IncorrectState", "Volume 'vol-1' is in the 'detaching' state.").is_not_attached());
    assert!(answered("InvalidAttachment.NotFound", "").is_not_attached());
    assert!(answered("InvalidInstanceID.NotFound", "").is_not_attached());
    assert!(!answered("UnauthorizedOperation", "").is_not_attached());
}

#[test]
fn device_names_are_those_that_are_free() {
    let mut taken: BTreeSet<String> = ["/dev/xvda", "/dev/sda1"].map(str::to_owned).into();
    let mut names = Vec::new();
    while let Some(name) = names::free(&taken) {
        assert!(taken.insert(name.clone()), "{name} twice");
        names.push(name);
    }
    assert_eq!(names[..2], ["/dev/sdf", "/dev/sdg"]);
    assert_eq!(names[10..12], ["/dev/sdp", "/dev/xvdba"]);
    assert_eq!(names.len(), 11 + 3 * 26 + 24);
    assert!(names.contains(&"/dev/xvddx".to_owned()) && !names.contains(&"/dev/xvddy".to_owned()));
    // The same by its other name, and without the folder.
    let taken = ["/dev/xvdf", "sdg", "xvdh1"].map(str::to_owned).into();
    assert_eq!(names::free(&taken).as_deref(), Some("/dev/sdi"));
}

fn instance(id: &str, zone: &str, kind: &str, state: &str) -> Instance {
    let [id, zone, kind, state] = [id, zone, kind, state].map(str::to_owned);
    Instance { id, zone, kind, state, devices: Vec::new() }
}

#[test]
fn machines_that_cannot_share_a_disk_are_named() {
    let found = [
        instance("i-1", "z-a", "r6i.large", "running"),
        instance("i-2", "z-b", "r6i.large", "running"),
        instance("i-3", "z-a", "m4.large", "running"),
        instance("i-4", "z-a", "r6i.large", "stopping"),
    ];
    let check = |ids: &[&str]| {
        let ids: Vec<String> = ids.iter().map(|id| (*id).to_owned()).collect();
        unfit(&ids, &found, &["r6i.large".to_owned()], "z-a")
    };
    assert!(check(&["i-1"]).is_empty());
    let problems = check(&["i-1", "i-2", "i-3", "i-4", "i-5"]);
    for (problem, parts) in problems.iter().zip([
        ["i-2", "zone z-b"],
        ["i-3", "not built on Nitro"],
        ["i-4", "stopping"],
        ["i-5", "no machine"],
    ]) {
        assert!(parts.iter().all(|part| problem.contains(part)), "{problem}");
    }
    assert_eq!(problems.len(), 4);
}

#[test]
fn a_machine_counts_as_running_until_it_certainly_does_not() {
    for (state, running) in [
        ("pending", true),
        ("running", true),
        ("stopping", true),
        ("shutting-down", true),
        ("", true),
        ("stopped", false),
        ("terminated", false),
    ] {
        assert_eq!(machine_state(instance("i-1", "z", "k", state)).running, running, "{state}");
    }
}

#[test]
fn it_is_dropped_in_an_async_context_and_refuses_a_nameless_cluster() {
    let settings = AwsSettings {
        region: Some("eu-central-1".to_owned()),
        zone: Some("eu-central-1a".to_owned()),
        instance_id: Some("i-0a1b2c3d4e5f60718".to_owned()),
        cluster_tag: "test".to_owned(),
        ..AwsSettings::default()
    };
    assert!(Aws::connect(AwsSettings { cluster_tag: String::new(), ..settings.clone() }).is_err());
    let elsewhere = AwsSettings { region: Some("us-east-1".to_owned()), ..settings.clone() };
    assert!(Aws::connect(elsewhere).unwrap_err().message().contains("not in region us-east-1"));
    // Nothing is asked of anybody: the settings say all.
    let aws = Aws::connect(settings).unwrap();
    assert_eq!(aws.machine().zone, "eu-central-1a");
    Builder::new_current_thread().build().unwrap().block_on(async move { drop(aws) });
}

#[test]
fn without_a_metadata_service_it_is_said_what_to_give() {
    let settings = AwsSettings {
        imds_endpoint: Some("http://127.0.0.1:9".to_owned()),
        cluster_tag: "test".to_owned(),
        ..AwsSettings::default()
    };
    let error = Aws::connect(settings).unwrap_err();
    assert!(error.message().contains("give --region, --zone and --instance-id"), "{error}");
}
