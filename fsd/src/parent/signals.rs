//! Signals, taken one by one by a thread that waits for nothing else: they are blocked, and fetched by sigtimedwait(2). No handler
//! runs, and none is lost while nobody waits.

use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

/// What is waited for.
const TAKEN: [libc::c_int; 5] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGABRT, libc::SIGCHLD];

/// Signals of this thread, which must be the process's only one.
pub(super) struct Signals {
    taken: libc::sigset_t,
    before: libc::sigset_t,
}

impl Signals {
    /// Blocks them from now on.
    pub(super) fn block() -> io::Result<Signals> {
        let mut taken = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the set, and the numbers are valid.
        let taken = unsafe {
            libc::sigemptyset(taken.as_mut_ptr());
            for signal in TAKEN {
                libc::sigaddset(taken.as_mut_ptr(), signal);
            }
            taken.assume_init()
        };
        let mut before = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: both pointers are to sets of this function; the default action of SIGCHLD keeps children until they are waited for.
        let before = unsafe {
            libc::signal(libc::SIGCHLD, libc::SIG_DFL);
            if libc::sigprocmask(libc::SIG_BLOCK, &raw const taken, before.as_mut_ptr()) != 0 {
                return Err(io::Error::last_os_error());
            }
            before.assume_init()
        };
        Ok(Signals { taken, before })
    }

    /// What was blocked before.
    pub(super) fn before(&self) -> libc::sigset_t {
        self.before
    }

    /// The next one; `None`: none within that time, or something else has interrupted the waiting.
    pub(super) fn next(&self, within: Option<Duration>) -> Option<libc::c_int> {
        let signal = match within {
            // SAFETY: the set is initialised, and nobody wants to know more than the number.
            None => unsafe { libc::sigwaitinfo(&raw const self.taken, std::ptr::null_mut()) },
            Some(within) => {
                let time = libc::timespec {
                    tv_sec: libc::time_t::try_from(within.as_secs()).unwrap_or(libc::time_t::MAX),
                    tv_nsec: within.subsec_nanos().into(),
                };
                // SAFETY: as above; the time is this function's.
                unsafe { libc::sigtimedwait(&raw const self.taken, std::ptr::null_mut(), &raw const time) }
            }
        };
        (signal > 0).then_some(signal)
    }
}

/// Sets the calling thread's mask. May be called between fork and exec.
pub(super) fn restore(mask: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: the set is initialised.
    match unsafe { libc::sigprocmask(libc::SIG_SETMASK, std::ptr::from_ref(mask), std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
