/*! Signals whose default action would end a run without a word, and those that were ignored at the start. */

use std::ptr;

/// The signals that ask a run to stop.
const STOPPING: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// Makes a write beyond a limit on file sizes (`ulimit -f`) an error of that write. Called before any
/// thread is started.
pub fn guard() {
    // SAFETY: no handler of ours is involved; ignoring the signal makes the write fail with EFBIG.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

/// Runs `install`, which sets handlers for the signals that stop a run, and ignores those again that were
/// ignored before: `nohup` and shells' background jobs mean it. They are blocked meanwhile, so that none
/// is handled in between.
pub fn keep_ignored<T>(install: impl FnOnce() -> T) -> T {
    // SAFETY: every struct is filled by the call that gets it; a null pointer asks for nothing.
    unsafe {
        let ignored = STOPPING.map(|signal| {
            let mut action: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, ptr::null(), &mut action) == 0
                && action.sa_sigaction == libc::SIG_IGN
        });
        let mut blocked: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut blocked);
        for signal in STOPPING {
            libc::sigaddset(&mut blocked, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &blocked, &mut before);
        let result = install();
        for (signal, _) in STOPPING.into_iter().zip(ignored).filter(|(_, ignored)| *ignored) {
            libc::signal(signal, libc::SIG_IGN);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, ptr::null_mut());
        result
    }
}
