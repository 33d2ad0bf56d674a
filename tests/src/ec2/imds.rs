//! The metadata service of an instance (IMDSv2).

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::http::Cut;
use super::model::InstanceState;
use super::xml::{ACCOUNT, iso8601};
use super::{ROLE, Shared};

const TOKEN: &str = "x-aws-ec2-metadata-token";
const TOKEN_TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";
const CREDENTIALS: &str = "/latest/meta-data/iam/security-credentials";
/// Longest life of a token, in seconds.
const LONGEST: u64 = 21_600;
/// How long those who ask one that does not answer wait for it at most.
const SILENCE: Duration = Duration::from_secs(30);

#[derive(Debug)]
struct Service {
    shared: Arc<Shared>,
    instance: String,
    /// Until when each is good.
    tokens: Mutex<HashMap<String, Instant>>,
}

/// The endpoint of an instance.
pub(super) fn routes(shared: Arc<Shared>, instance: &str) -> Router {
    let service = Service { shared, instance: instance.to_owned(), tokens: Mutex::default() };
    Router::new().fallback(answer).with_state(Arc::new(service))
}

async fn answer(
    State(service): State<Arc<Service>>,
    ConnectInfo(cut): ConnectInfo<Cut>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    let (instance, region, live) = {
        let state = service.shared.lock();
        let instance = state.world.instances[&service.instance].clone();
        (instance, state.options.region.clone(), state.options.credentials_live)
    };
    if !instance.imds_answers {
        return cut.after(SILENCE).await;
    }
    let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
    match (method, uri.path()) {
        (Method::PUT, "/latest/api/token") => {
            let ttl = header(TOKEN_TTL).and_then(|ttl| ttl.parse().ok());
            match ttl.filter(|ttl| (1..=LONGEST).contains(ttl)) {
                Some(ttl) => ([(TOKEN_TTL, ttl.to_string())], service.token(ttl)).into_response(),
                None => StatusCode::BAD_REQUEST.into_response(),
            }
        }
        (Method::GET, path) => {
            if !header(TOKEN).is_some_and(|token| service.takes(token)) {
                return StatusCode::UNAUTHORIZED.into_response();
            }
            match document(path, &instance, &region, live) {
                Some(text) => text.into_response(),
                None => StatusCode::NOT_FOUND.into_response(),
            }
        }
        _ => StatusCode::METHOD_NOT_ALLOWED.into_response(),
    }
}

impl Service {
    fn token(&self, ttl: u64) -> String {
        let token = format!("{:032x}==", fastrand::u128(..));
        let until = Instant::now() + Duration::from_secs(ttl);
        self.tokens.lock().unwrap().insert(token.clone(), until);
        token
    }

    fn takes(&self, token: &str) -> bool {
        self.tokens.lock().unwrap().get(token).is_some_and(|until| Instant::now() < *until)
    }
}

fn document(path: &str, instance: &InstanceState, region: &str, live: Duration) -> Option<String> {
    let role = path.strip_prefix(CREDENTIALS).map(|rest| rest.trim_start_matches('/'));
    let now = SystemTime::now();
    // Seconds only, as the real one writes them.
    let time = |time| format!("{}Z", &iso8601(time)[..19]);
    Some(match path {
        "/latest/meta-data/instance-id" => instance.id.clone(),
        "/latest/meta-data/instance-type" => instance.instance_type.clone(),
        "/latest/meta-data/placement/region" => region.to_owned(),
        "/latest/meta-data/placement/availability-zone" => instance.zone.clone(),
        "/latest/dynamic/instance-identity/document" => {
            let document = json!({
                "accountId": ACCOUNT,
                "architecture": "x86_64",
                "availabilityZone": instance.zone,
                "imageId": "ami-0123456789abcdef0",
                "instanceId": instance.id,
                "instanceType": instance.instance_type,
                "pendingTime": time(instance.launched),
                "privateIp": "127.0.0.1",
                "region": region,
                "version": "2017-09-30",
            });
            format!("{document:#}")
        }
        _ => match role? {
            "" => ROLE.to_owned(),
            ROLE => {
                let credentials = json!({
                    "Code": "Success",
                    "LastUpdated": time(now),
                    "Type": "AWS-HMAC",
                    "AccessKeyId": instance.access_key,
                    "SecretAccessKey": "secret-that-nobody-checks",
                    "Token": "session-token-that-nobody-checks",
                    "Expiration": time(now + live),
                });
                format!("{credentials:#}")
            }
            _ => return None,
        },
    })
}
