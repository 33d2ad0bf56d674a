//! How calls of EC2 fail, and what that means here.

use std::fmt;

use shardfs_proto::types::{Error, Reason};

use crate::volume::cloud::TAG_CLUSTER;

/// Bytes of EC2's message that are passed on: it may hold an encoded text of a kilobyte, of use only if it is whole.
const MESSAGE_BYTES_MAX: usize = 2048;

/// A call that failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Failure {
    /// As policies name it, such as `ec2:AttachVolume`.
    pub(super) action: &'static str,
    pub(super) class: Class,
    /// EC2's code; empty: it did not answer.
    pub(super) code: String,
    pub(super) message: String,
}

/// What a failure means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Class {
    /// The role does not allow it.
    Denied,
    /// There are no credentials, or EC2 does not take them.
    Credentials,
    /// Too much at a time. For certain not done.
    Throttled,
    /// Done or not: no answer came, or one of a server that failed.
    Unknown,
    /// What the call names is not there, or EC2 has not heard of it yet.
    Missing,
    /// What the call names does not allow it as it is now.
    State,
    /// Not before hours have passed.
    Later,
    /// A limit of the account or of a machine.
    Quota,
    /// The token was used for something else.
    TokenReused,
    /// Everything else that EC2 refuses.
    Refused,
}

impl Failure {
    /// What EC2 answered.
    pub(super) fn answered(action: &'static str, status: u16, code: &str, message: &str) -> Failure {
        Failure { action, class: classify(status, code), code: code.to_owned(), message: shortened(message) }
    }

    /// EC2 did not answer.
    pub(super) fn unanswered(action: &'static str, class: Class, message: &str) -> Failure {
        Failure { action, class, code: String::new(), message: shortened(message) }
    }

    /// Whether the same call may succeed in a moment, whatever it is.
    pub(super) fn passes(&self) -> bool {
        matches!(self.class, Class::Throttled | Class::Unknown)
    }

    /// `AttachVolume`: another disk has the device name.
    pub(super) fn is_name_taken(&self) -> bool {
        self.code == "InvalidParameterValue" && self.message.contains("already in use")
    }

    /// `DetachVolume`: the machine does not have the disk.
    pub(super) fn is_not_attached(&self) -> bool {
        match self.code.as_str() {
            "IncorrectState" => self.message.contains("available"),
            code => self.class == Class::Missing || code == "InvalidAttachment.NotFound",
        }
    }

    /// The action that is not allowed: making something with tags needs more than one.
    fn denied_action(&self) -> &str {
        let named = self.message.split_once("to perform: ").map(|(_, rest)| rest);
        let named = named.and_then(|rest| rest.split_whitespace().next());
        named.filter(|name| name.contains(':')).unwrap_or(self.action)
    }

    fn advice(&self) -> String {
        match (self.class, self.code.as_str()) {
            (Class::Denied, _) => format!(
                "the role of this machine does not allow {}, or what it is asked for lacks the tag {TAG_CLUSTER} that \
                 the role requires: see deploy/iam-policy.json",
                self.denied_action()
            ),
            (Class::Credentials, "") => {
                "there are no credentials for AWS: give this machine an instance profile with \
                 the role (DEPLOYMENT.md)"
                    .to_owned()
            }
            (Class::Credentials, _) => {
                "the credentials are not valid or have expired: check the role of this \
                 machine, AWS_* of its environment if set, and its clock"
                    .to_owned()
            }
            (Class::Throttled | Class::Unknown, _) => "repeat it".to_owned(),
            (Class::Missing, _) => "check its id and the region".to_owned(),
            (Class::State, _) => "repeat it when it is over".to_owned(),
            (Class::Later, "ConcurrentSnapshotLimitExceeded") => {
                "another snapshot of the disk is not complete yet: repeat it when it is".to_owned()
            }
            (Class::Later, _) => {
                "EBS allows the next change of a disk some hours after the last: repeat it then".to_owned()
            }
            (Class::Quota, "AttachmentLimitExceeded" | "VolumeAttachmentLimitExceeded") => {
                "detach another disk from this machine, or use a machine of a type that takes more".to_owned()
            }
            (Class::Quota, _) => {
                "delete what is not needed, or have AWS raise the account's quota (Service Quotas)".to_owned()
            }
            (Class::TokenReused, _) => {
                "the token was used for something of other properties: give those, or another token"
                    .to_owned()
            }
            (Class::Refused, _) => "check the arguments".to_owned(),
        }
    }

    fn reason(&self) -> Reason {
        match self.class {
            Class::Denied | Class::Credentials => Reason::NotPermitted,
            Class::Throttled | Class::Unknown | Class::State | Class::Later => Reason::Unavailable,
            Class::Missing => Reason::NotFound,
            Class::Quota => Reason::Unsupported,
            Class::TokenReused | Class::Refused => Reason::InvalidArgument,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Failure { action, code, message, .. } = self;
        match code.as_str() {
            "" => write!(f, "{action}: {message}"),
            code => write!(f, "{action}: {code}: {message}"),
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        Error::new(failure.reason(), format!("{} ({failure})", failure.advice()))
    }
}

/// By EC2's code, of which there are hundreds: those that are told apart, and the rest by its form and the status.
fn classify(status: u16, code: &str) -> Class {
    match code {
        "UnauthorizedOperation" | "AccessDenied" | "AccessDeniedException" => Class::Denied,
        "AuthFailure"
        | "ExpiredToken"
        | "ExpiredTokenException"
        | "IncompleteSignature"
        | "InvalidAccessKeyId"
        | "InvalidClientTokenId"
        | "InvalidSecurity"
        | "MissingAuthenticationToken"
        | "OptInRequired"
        | "RequestExpired"
        | "SignatureDoesNotMatch"
        | "UnrecognizedClientException" => Class::Credentials,
        "EC2ThrottledException"
        | "RequestLimitExceeded"
        | "RequestThrottled"
        | "SlowDown"
        | "SnapshotCreationPerVolumeRateExceeded"
        | "Throttling"
        | "ThrottlingException"
        | "TooManyRequestsException" => Class::Throttled,
        "InsufficientVolumeCapacity" | "RequestTimeout" => Class::Unknown,
        "IncorrectState"
        | "IncorrectModificationState"
        | "InvalidSnapshot.InUse"
        | "OperationNotPermitted"
        | "VolumeInUse" => Class::State,
        "ConcurrentSnapshotLimitExceeded" | "VolumeModificationRateExceeded" => Class::Later,
        "AttachmentLimitExceeded"
        | "MaxIOPSLimitExceeded"
        | "SnapshotLimitExceeded"
        | "VolumeAttachmentLimitExceeded"
        | "VolumeIOPSLimit"
        | "VolumeLimitExceeded" => Class::Quota,
        "IdempotentParameterMismatch" => Class::TokenReused,
        code if code.ends_with(".NotFound") => Class::Missing,
        // No answer of EC2, but of something on the way to it.
        "" => Class::Unknown,
        _ if status >= 500 => Class::Unknown,
        _ => Class::Refused,
    }
}

fn shortened(message: &str) -> String {
    let mut end = message.len().min(MESSAGE_BYTES_MAX);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    message[..end].to_owned()
}
