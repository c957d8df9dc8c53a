/*! A process opens the driver once, so every state of a machine is a process of its own: this test
program again, with a made-up libcuda in its loader's path. */

use std::path::Path;
use std::process::Command;

use super::*;
use crate::Kind;
use crate::backend::cuda::skipped;

/// Set in the processes that [`probe`] starts: the number of the device to open.
const PROBE: &str = "ATOM_TEST_PROBE";

/// Not a test by itself: prints what [`device`] answers, for [`probe`].
#[test]
fn probe_of_the_other_tests() {
    let Ok(ordinal) = std::env::var(PROBE) else { return };
    match device(ordinal.parse().unwrap()) {
        Ok(device) => println!("{device:?}"),
        Err(error) => {
            assert_eq!(error.kind(), Kind::Machine);
            println!("error: {error}\nhint: {}", error.hint_text().unwrap());
        }
    }
}

/// What a process reports that opens `cuda:<ordinal>` with libraries of `directory`.
fn probe(directory: &Path, ordinal: usize) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "backend::cuda::libraries::tests::probe_of_the_other_tests"])
        .arg("--nocapture")
        .env(PROBE, ordinal.to_string())
        .env("LD_LIBRARY_PATH", directory)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (stdout, stderr) = (text(output.stdout), text(output.stderr));
    assert!(output.status.success() && !stderr.contains("panicked"), "{stdout}\n{stderr}");
    stdout
}

/// A made-up driver.
struct Fake {
    version: i32,
    init: i32,
    devices: i32,
    capability: (i32, i32),
    lacks: &'static str,
}

impl Fake {
    /// One that is as it should be.
    const GOOD: Self =
        Self { version: 13000, init: 0, devices: 2, capability: (9, 0), lacks: "nothing" };

    /// Builds it with gcc; none where there is no gcc.
    fn build(&self, test: &str) -> Option<tempfile::TempDir> {
        let directory = tempfile::tempdir().unwrap();
        let body = |symbol: &str| match symbol {
            "cuDriverGetVersion" => {
                format!("(int *n) {{ *n = {}; return 0; }}", self.version)
            }
            "cuInit" => format!("(int flags) {{ return {}; }}", self.init),
            "cuDeviceGetCount" => format!("(int *n) {{ *n = {}; return 0; }}", self.devices),
            "cuDeviceGet" => "(int *device, int n) { *device = n; return 0; }".to_owned(),
            "cuDeviceGetName" => {
                "(char *to, int n, int device) { strcpy(to, \"Fake GPU\"); return 0; }".to_owned()
            }
            "cuDeviceTotalMem_v2" => {
                "(size_t *bytes, int device) { *bytes = 4096; return 0; }".to_owned()
            }
            // 75 and 76 are the capability's halves.
            "cuDeviceGetAttribute" => format!(
                "(int *to, int which, int device) {{ *to = which == 75 ? {} : {}; return 0; }}",
                self.capability.0, self.capability.1
            ),
            _ => "(void) { abort(); }".to_owned(),
        };
        let mut source = "#include <stdlib.h>\n#include <string.h>\n".to_owned();
        for symbol in DRIVER_SYMBOLS.iter().filter(|symbol| **symbol != self.lacks) {
            source += &format!("int {symbol}{}\n", body(symbol));
        }
        let file = directory.path().join("cuda.c");
        fs_err::write(&file, source).unwrap();
        let built = Command::new("gcc")
            .args(["-shared", "-fPIC", "-w", "-o"])
            .arg(directory.path().join("libcuda.so"))
            .arg(&file)
            .status();
        match built {
            Ok(status) => assert!(status.success()),
            Err(error) => {
                skipped(test, &format!("gcc cannot be run: {error}"));
                return None;
            }
        }
        // Under the name that goes before and the one a machine without the toolkit has, so that a
        // driver of this machine is not taken for it.
        let file = |name| directory.path().join(name);
        fs_err::copy(file("libcuda.so"), file("libcuda.so.1")).unwrap();
        Some(directory)
    }
}

/// What a process reports that opens `cuda:<ordinal>` of a made-up driver.
fn probe_fake(test: &str, fake: &Fake, ordinal: usize) -> Option<String> {
    fake.build(test).map(|directory| probe(directory.path(), ordinal))
}

#[track_caller]
fn assert_says(said: &str, parts: &[&str]) {
    for part in parts {
        assert!(said.contains(part), "`{part}` is not in: {said}");
    }
}

#[test]
fn a_machine_without_a_driver_is_told_so() {
    // SAFETY: the check opens the driver's library, if there is one.
    if unsafe { driver::sys::is_culib_present() } {
        return skipped("a_machine_without_a_driver_is_told_so", "this machine has a driver");
    }
    let error = driver().unwrap_err();
    assert_eq!(error.kind(), Kind::Machine);
    assert_eq!(error.message(), "the CUDA driver's library libcuda.so.1 was not found");
    assert!(error.hint_text().unwrap().ends_with("or run with --device cpu"));
    assert_eq!(device(0).unwrap_err().message(), error.message());
}

#[test]
fn libraries_of_the_toolkit_are_there_or_named() {
    let checks = [("NVRTC", nvrtc().map(drop)), ("cuBLASLt", cublaslt()), ("cuSOLVER", cusolver())];
    for (name, checked) in checks {
        if let Err(error) = checked {
            assert_eq!(error.kind(), Kind::Machine);
            assert_says(&error.message(), &[name, "was not found"]);
            assert_says(error.hint_text().unwrap(), &["pip install", VARIABLE, "--device cpu"]);
        }
    }
}

#[test]
fn a_driver_of_a_machine_without_devices_is_told_so() {
    let test = "a_driver_of_a_machine_without_devices_is_told_so";
    let none = Fake { init: 100, ..Fake::GOOD };
    let Some(said) = probe_fake(test, &none, 0) else { return };
    assert_says(&said, &["error: cuInit failed: CUDA_ERROR_NO_DEVICE", "CUDA_VISIBLE_DEVICES"]);
    let said = probe_fake(test, &Fake { devices: 0, ..Fake::GOOD }, 0).unwrap();
    assert_says(&said, &["error: the CUDA driver shows no device", "CUDA_VISIBLE_DEVICES"]);
}

#[test]
fn an_old_driver_is_named_by_its_version() {
    let test = "an_old_driver_is_named_by_its_version";
    // It lacks a symbol as well: the version says more.
    let old = Fake { version: 12040, lacks: "cuEventElapsedTime_v2", ..Fake::GOOD };
    let Some(said) = probe_fake(test, &old, 0) else { return };
    assert_says(&said, &["error: the CUDA driver supports CUDA 12.4, 12.8 is needed", "570"]);
    let odd = Fake { lacks: "cuEventElapsedTime_v2", ..Fake::GOOD };
    let said = probe_fake(test, &odd, 0).unwrap();
    assert_says(&said, &["error: the CUDA driver lacks `cuEventElapsedTime_v2`", "570"]);
}

#[test]
fn a_device_is_taken_if_it_is_there_and_new_enough() {
    let test = "a_device_is_taken_if_it_is_there_and_new_enough";
    let Some(said) = probe_fake(test, &Fake::GOOD, 1) else { return };
    let expected = Device {
        ordinal: 1,
        name: "Fake GPU".to_owned(),
        capability: Version { major: 9, minor: 0 },
        memory_bytes: 4096,
        driver: Version { major: 13, minor: 0 },
    };
    assert_says(&said, &[&format!("{expected:?}")]);
    let said = probe_fake(test, &Fake::GOOD, 3).unwrap();
    assert_says(&said, &["error: cuda:3 was asked for, but there are 2 devices", "cuda:1"]);
    let one = Fake { devices: 1, ..Fake::GOOD };
    let said = probe_fake(test, &one, 1).unwrap();
    assert_says(&said, &["error: cuda:1 was asked for, but there is 1 device", "--device cuda:0"]);
    let old = Fake { capability: (7, 5), ..Fake::GOOD };
    let said = probe_fake(test, &old, 0).unwrap();
    assert_says(&said, &["error: Fake GPU has compute capability 7.5, 8.0 is needed"]);
}

#[test]
fn a_driver_loads_machine_code_of_its_own_major_version() {
    let version = |major, minor| Version { major, minor };
    assert!(loads(version(13, 0), version(13, 5)).is_ok());
    assert!(loads(version(13, 0), version(12, 8)).is_ok());
    let error = loads(version(12, 8), version(13, 0)).unwrap_err();
    assert_says(&error.message(), &["13.0", "12.8"]);
    assert_eq!(Version::from_thousands(12080), version(12, 8));
}
