/*! Memory and processor time that this process has used. */

/// Highest resident memory of this process so far.
pub fn peak_rss_bytes() -> u64 {
    usage().ru_maxrss as u64 * 1024
}

/// CPU seconds, user and system, that this process has used so far.
pub fn cpu_seconds() -> f64 {
    let usage = usage();
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 * 1e-6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

fn usage() -> libc::rusage {
    // SAFETY: getrusage fills the struct it is given, for which all zeros is a valid value.
    unsafe {
        let mut usage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    }
}
