//! A node from its start to its end, as the process that it is: signals, and what the service manager is told.

use std::time::Duration;

use anyhow::Result;

use crate::config::NodeConfig;
use crate::node::Node;
use crate::notify;
use crate::parent::Child;
use crate::reload::Reload;

/// Starts a node and keeps it until a signal, or until it cannot go on. A second signal ends the process at once, unless it
/// comes so soon that it is the first one by another way. SIGHUP reads the settings again.
pub async fn run(config: NodeConfig, child: Child, reload: &Reload) -> Result<()> {
    let mut signals = Signals::new()?;
    let mut node = tokio::select! {
        started = Node::start(config, child) => started?,
        name = signals.next() => {
            tracing::info!("{name} before the node was ready");
            return Ok(());
        }
    };
    let failure = loop {
        tokio::select! {
            heard = signals.heard() => match heard {
                Heard::End(name) => {
                    tracing::info!("{name}");
                    break None;
                }
                Heard::Reload => {
                    notify::reloading();
                    node.reload(reload);
                    notify::ready();
                }
            },
            failure = node.failed() => break Some(failure),
        }
    };
    let one_until = tokio::time::Instant::now() + ONE_SIGNAL;
    let stopped = tokio::select! {
        stopped = node.shutdown() => stopped,
        name = signals.next_after(one_until) => {
            tracing::warn!("{name} again: ending at once; the next start cleans up");
            std::process::exit(1);
        }
    };
    match failure {
        Some(failure) => Err(failure),
        None => stopped,
    }
}

/// Signals within so long are one: systemd sends its to all processes of the unit, so the node hears it from systemd and from
/// its parent, which passes it on.
const ONE_SIGNAL: Duration = Duration::from_secs(2);

enum Heard {
    /// To end, by the signal of that name.
    End(&'static str),
    /// To read the settings again.
    Reload,
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> Result<Signals> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    async fn heard(&mut self) -> Heard {
        tokio::select! {
            _ = self.terminate.recv() => Heard::End("SIGTERM"),
            _ = self.interrupt.recv() => Heard::End("SIGINT"),
            _ = self.hang_up.recv() => Heard::Reload,
        }
    }

    /// The next one to end.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }

    /// The next one that comes after that moment; those before it are taken for what was heard already.
    async fn next_after(&mut self, moment: tokio::time::Instant) -> &'static str {
        loop {
            let name = self.next().await;
            if tokio::time::Instant::now() >= moment {
                return name;
            }
            tracing::debug!("{name} once more: taken for the same");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_signal_by_two_ways_is_one() {
        const ONE: Duration = Duration::from_secs(3);
        let mut signals = Signals::new().unwrap();
        let send = || {
            let me = rustix::process::getpid();
            rustix::process::kill_process(me, rustix::process::Signal::TERM).unwrap();
        };
        send();
        assert_eq!(signals.next().await, "SIGTERM");
        let until = tokio::time::Instant::now() + ONE;
        send();
        let soon = tokio::time::timeout(ONE / 2, signals.next_after(until)).await;
        assert!(soon.is_err(), "it is the first one still");
        tokio::time::sleep_until(until).await;
        send();
        let later = tokio::time::timeout(Duration::from_secs(60), signals.next_after(until)).await;
        assert_eq!(later.unwrap(), "SIGTERM");
    }
}
