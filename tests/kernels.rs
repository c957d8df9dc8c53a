/*! What the CUDA kernels become, checked without a GPU: NVRTC compiles every family for every
architecture, its log reports spilled registers, and the machine code is searched for
the tensor cores' instructions. */

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use atom::backend::cuda::compile::Compiler;
use atom::backend::cuda::kernels::FAMILIES;
use atom::backend::cuda::libraries::{self, Version};
use common::{names, skipped};
use fs_err as fs;

/// One architecture of every generation the kernels run on, and 8.6 and 8.9, which have less shared
/// memory than 8.0.
const ARCHITECTURES: [&str; 6] = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"];

/// Registers of a block of 1,024 threads hold 64 values a thread; this kernel needs 128.
const SPILLS: &str = r#"
extern "C" __global__ void __launch_bounds__(1024) spills(const float* from, float* to) {
    float kept[128];
#pragma unroll
    for (int i = 0; i < 128; ++i) kept[i] = from[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 128; ++i) to[threadIdx.x * 128 + (i * 37) % 128] = kept[i] * kept[127 - i];
}"#;

/// Registers have no index: a table that is read by one lies in memory.
const STACK: &str = r#"
extern "C" __global__ void stacks(const int* at, float* to) {
    float table[64];
    for (int i = 0; i < 64; ++i) table[i] = to[i];
    for (int i = 0; i < 64; ++i) table[at[i]] += 1;
    for (int i = 0; i < 64; ++i) to[i + threadIdx.x] = table[at[i + 64]];
}"#;

/// A product on the tensor cores; `PLAIN` leaves it out.
const TENSOR: &str = r#"
extern "C" __global__ void multiplies(const unsigned* a, int* d) {
    unsigned i = threadIdx.x;
    int c[4] = {0, 0, 0, 0};
#if !PLAIN
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[i]), "r"(a[i + 32]), "r"(a[i + 64]), "r"(a[i + 96]), "r"(a[i + 128]), "r"(a[i + 160]));
#endif
    for (int j = 0; j < 4; ++j) d[i + 32 * j] = c[j] + int(a[i]);
}"#;

/// What the compiler's log says of one function.
#[derive(Debug)]
struct Usage {
    function: String,
    stack_bytes: u32,
    spill_bytes: u32,
}

impl Usage {
    /// Every function of a log.
    fn all(log: &str) -> Vec<Self> {
        let mut function = None;
        let mut all = Vec::new();
        for line in log.lines() {
            if let Some((_, name)) = line.split_once("Function properties for ") {
                function = Some(name.trim().to_owned());
            } else if line.contains(" bytes stack frame")
                && let Some(function) = function.take()
            {
                let bytes = |what: &str| -> u32 {
                    let before = line.split(what).next().unwrap();
                    before.rsplit([' ', ',']).next().unwrap().parse().unwrap()
                };
                all.push(Self {
                    function,
                    stack_bytes: bytes(" bytes stack frame"),
                    spill_bytes: bytes(" bytes spill stores") + bytes(" bytes spill loads"),
                });
            }
        }
        all
    }
}

/// What is wrong with a program by its log; a log without usage lines is wrong as well.
fn log_faults(log: &str) -> Vec<String> {
    let usage = Usage::all(log);
    let entries = log.matches("Compiling entry function").count();
    let mut faults = Vec::new();
    if entries == 0 || usage.len() < entries {
        faults.push(format!("the log has {} of {entries} kernels:\n{log}", usage.len()));
    }
    for Usage { function, stack_bytes, spill_bytes } in usage {
        if stack_bytes + spill_bytes > 0 {
            faults.push(format!("{function}: {stack_bytes} bytes of stack, {spill_bytes} spilled"));
        }
    }
    // ptxas reports serialized wgmma as information only.
    let serialized =
        |line: &&str| line.contains("ptxas warning") || line.contains("Potential Performance Loss");
    faults.extend(log.lines().filter(serialized).map(str::to_owned));
    faults
}

/// NVIDIA's disassembler of machine code.
struct Disassembler {
    program: PathBuf,
    directory: tempfile::TempDir,
}

impl Disassembler {
    /// `$ATOM_NVDISASM`, or that of the Python packages, or that on the path; none where none runs.
    fn find(test: &str) -> Option<Self> {
        let below = |lib: PathBuf| lib.parent().map(|home| home.join("bin/nvdisasm"));
        let packages = Command::new("python3")
            .args(["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
            .output()
            .ok()
            .and_then(|output| String::from_utf8(output.stdout).ok())
            .map(|path| Path::new(path.trim()).join("nvidia/cu13/bin/nvdisasm"));
        let variable = |name| std::env::var_os(name).map(PathBuf::from);
        let candidates = [
            variable("ATOM_NVDISASM"),
            variable(libraries::VARIABLE).and_then(below),
            packages,
            Some(PathBuf::from("nvdisasm")),
        ];
        let runs = |program: &PathBuf| {
            Command::new(program).arg("--version").output().is_ok_and(|o| o.status.success())
        };
        let Some(program) = candidates.into_iter().flatten().find(runs) else {
            skipped(test, "nvdisasm was not found: install tests/requirements.txt");
            return None;
        };
        Some(Self { program, directory: tempfile::tempdir().unwrap() })
    }

    /// The machine code's instructions, one a line.
    fn listing(&self, cubin: &[u8]) -> String {
        let file = tempfile::NamedTempFile::new_in(self.directory.path()).unwrap();
        fs::write(file.path(), cubin).unwrap();
        // Without the analysis of data flow: it is a third of the time.
        let output =
            Command::new(&self.program).args(["-c", "-ndf"]).arg(file.path()).output().unwrap();
        let listing = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && listing.contains("EXIT"), "{output:?}");
        listing
    }
}

/// Whether an instruction, such as `HMMA`, is in a listing.
fn finds(listing: &str, instruction: &str) -> bool {
    listing.split_whitespace().any(|word| word.split('.').next() == Some(instruction))
}

/// The functions of a listing in which an instruction is not.
fn functions_without(listing: &str, instruction: &str) -> Vec<String> {
    let functions = listing.split(".section\t.text.").skip(1);
    functions
        .filter(|function| !finds(function, instruction))
        .map(|function| function.split(',').next().unwrap_or_default().to_owned())
        .collect()
}

/// Instructions of a listing that write a register of a left operand while the tensor cores may still read it: after a
/// `wgmma`, of which the compiler takes its operands to be free, and before the wait for it.
fn overwritten(listing: &str) -> Vec<String> {
    let register = |operand: Option<&str>| -> Option<usize> {
        operand?.trim().strip_prefix('R')?.split('.').next()?.parse().ok()
    };
    let mut read = std::collections::BTreeSet::new();
    let mut faults = Vec::new();
    for line in listing.lines() {
        let Some((_, line)) = line.split_once("*/") else { continue };
        let line = line.split(';').next().unwrap_or_default().trim();
        let guarded = line.strip_prefix('@').and_then(|line| line.split_once(' '));
        let line = guarded.map_or(line, |(_, line)| line.trim());
        let (name, operands) = line.split_once(' ').unwrap_or((line, ""));
        let mut operands = operands.split(',');
        let first = register(operands.next());
        if name.contains("GMMA.") {
            if let Some(left) = register(operands.next()) {
                read.extend(left..left + 4);
            }
        } else if name.contains("DEPBAR") && line.ends_with("0x0") {
            read.clear();
        } else if let Some(first) = first {
            let parts = |part: &str| name.split('.').any(|own| own == part);
            let width = if parts("128") {
                4
            } else if parts("64") || parts("WIDE") {
                2
            } else {
                1
            };
            if (first..first + width).any(|own| read.contains(&own)) {
                faults.push(format!("`{line}` writes what wgmma still reads"));
            }
        }
    }
    faults
}

/// The compute capability of an architecture such as `sm_90a`.
fn capability(architecture: &str) -> Version {
    let number: i32 = architecture.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap();
    Version { major: number / 10, minor: number % 10 }
}

/// The compiler for an architecture; none where there is no NVRTC.
fn compiler(test: &str, architecture: &str) -> Option<Compiler> {
    match Compiler::for_architecture(architecture) {
        Ok(compiler) => Some(compiler),
        Err(error) => {
            skipped(test, &format!("{error}; {}", error.hint_text().unwrap_or_default()));
            None
        }
    }
}

#[test]
fn every_kernel_file_is_in_the_list() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let files: Vec<String> = names(&directory)
        .into_iter()
        .filter_map(|name| name.strip_suffix(".cu").map(str::to_owned))
        .collect();
    let mut listed: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
    listed.sort_unstable();
    assert_eq!(listed, files);
}

/// The symbols of CUDA's libraries that a program calls: cudarc keeps the address of each in a static of the function of its name, of
/// which the linker retains those that are used.
fn called_symbols(program: &[u8]) -> BTreeSet<String> {
    let text = program.split(|byte| !byte.is_ascii_alphanumeric() && *byte != b'_');
    let names = text.filter_map(|word| std::str::from_utf8(word).ok());
    let symbol = |name: &str| {
        let (_, rest) = name.strip_prefix("_ZN6cudarc")?.split_once("3sys")?;
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (length, rest) = rest.split_at(digits);
        let (name, rest) = rest.split_at_checked(length.parse().ok()?)?;
        rest.starts_with("2_S").then(|| name.to_owned())
    };
    names.filter_map(symbol).collect()
}

#[test]
fn required_symbols_are_those_that_the_program_calls() {
    let called = called_symbols(&fs::read(env!("CARGO_BIN_EXE_atom")).unwrap());
    let required = libraries::required_symbols().into_iter().map(str::to_owned).collect();
    assert_eq!(called, required);
}

#[test]
fn inline_assembly_stands_in_one_header() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let has_assembly = |name: &String| {
        let text = fs::read_to_string(directory.join(name)).unwrap();
        text.contains("asm(") || text.contains("asm volatile")
    };
    let files: Vec<String> = names(&directory).into_iter().filter(has_assembly).collect();
    assert_eq!(files, ["ptx.cuh"]);
}

/// Names and types of the parameters of each kernel of a source.
fn parameters_of(source: &str) -> BTreeMap<String, Vec<(String, String)>> {
    let kernels = source.split("extern \"C\" __global__").skip(1);
    let kernel = |text: &str| {
        let text = text.trim_start().strip_prefix("void").unwrap().trim_start();
        let bounds = text.strip_prefix("__launch_bounds__(");
        let text = bounds.map_or(text, |rest| rest.split_once(')').unwrap().1);
        let (name, rest) = text.split_once('(').unwrap();
        let parameters = rest.split_once(')').unwrap().0.split(',').map(|parameter| {
            let words: Vec<&str> = parameter.split_whitespace().collect();
            let (name, kind) = words.split_last().unwrap();
            ((*name).to_owned(), kind.join(" "))
        });
        (name.trim().to_owned(), parameters.collect())
    };
    kernels.map(kernel).collect()
}

#[test]
fn declared_parameters_are_those_of_the_sources() {
    for family in FAMILIES {
        let mut defined = parameters_of(family.source);
        for declared in (family.kernels)() {
            for entry in declared.entries {
                let own = defined.remove(*entry);
                let own = own.unwrap_or_else(|| panic!("{}.cu has no `{entry}`", family.name));
                let names: Vec<&str> = own.iter().map(|(name, _)| name.as_str()).collect();
                let expected: Vec<&str> = declared.parameters.iter().map(|own| own.0).collect();
                assert_eq!(names, expected, "{entry}");
                for ((name, own), (_, types)) in own.iter().zip(&declared.parameters) {
                    assert!(types.contains(own), "{entry}: `{name}` is {own}, not of {types:?}");
                }
            }
        }
        assert!(defined.is_empty(), "{}.cu: not declared: {:?}", family.name, defined.keys());
    }
}

#[test]
fn a_file_without_one_of_its_constants_does_not_compile() {
    let test = "a_file_without_one_of_its_constants_does_not_compile";
    let Some(compiler) = compiler(test, "sm_90a") else { return };
    for family in FAMILIES {
        let defines = (family.variants)(capability("sm_90a")).remove(0);
        for without in 0..defines.len() {
            let mut fewer = defines.clone();
            let (name, _) = fewer.remove(without);
            let error = compiler.compile(family.name, family.source, &fewer).unwrap_err();
            let log = error.causes().join("\n");
            assert!(log.contains("a constant is missing"), "{} without {name}: {log}", family.name);
        }
    }
}

#[test]
fn kernels_spill_nothing_and_use_the_tensor_cores() {
    let test = "kernels_spill_nothing_and_use_the_tensor_cores";
    let mut programs = Vec::new();
    for family in FAMILIES {
        let all = ARCHITECTURES.into_iter();
        for architecture in all.filter(|own| family.only.is_none_or(|only| only == *own)) {
            let variants = (family.variants)(capability(architecture)).into_iter();
            programs.extend(variants.map(|defines| (family, defines, architecture)));
        }
    }
    assert!(!programs.is_empty(), "there is no kernel to compile: FAMILIES holds none");
    if compiler(test, ARCHITECTURES[0]).is_none() {
        return;
    }
    let disassembler = Disassembler::find(test);

    let start = Instant::now();
    let next = AtomicUsize::new(0);
    let faults = Mutex::new(Vec::new());
    let kernels = AtomicUsize::new(0);
    let work = || {
        while let Some((family, defines, architecture)) =
            programs.get(next.fetch_add(1, Ordering::Relaxed))
        {
            let compiler = Compiler::for_architecture(architecture).unwrap();
            let found = match compiler.compile(family.name, family.source, defines) {
                Err(error) => vec![error.to_string()],
                Ok((cubin, log)) => {
                    kernels.fetch_add(Usage::all(&log).len(), Ordering::Relaxed);
                    let mut found = log_faults(&log);
                    let instruction = family.tensor_core_with(defines);
                    // The same source on all newer architectures.
                    let waits = family.pdl && *architecture == "sm_90a";
                    if let (true, Some(tool)) = (instruction.is_some() || waits, &disassembler) {
                        let listing = tool.listing(&cubin);
                        if let Some(instruction) = instruction.filter(|one| !finds(&listing, one)) {
                            found.push(format!("there is no {instruction} in the machine code"));
                        }
                        if waits {
                            let all = functions_without(&listing, "ACQBULK").into_iter();
                            found.extend(
                                all.map(|one| format!("{one} does not wait for the kernel before")),
                            );
                        }
                        found.extend(overwritten(&listing));
                    }
                    found
                }
            };
            let macros: Vec<String> =
                defines.iter().map(|(name, value)| format!("{name}={value}")).collect();
            let program = format!("{} {} {architecture}", family.name, macros.join(" "));
            let mut faults = faults.lock().unwrap();
            faults.extend(found.into_iter().map(|fault| format!("{program}: {fault}")));
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    let mut faults = faults.into_inner().unwrap();
    eprintln!(
        "{} kernels in {} programs, compiled in {:.1} s on {threads} threads",
        kernels.into_inner(),
        programs.len(),
        start.elapsed().as_secs_f64()
    );
    faults.sort();
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

#[test]
fn kernels_that_spill_are_caught() {
    for architecture in ARCHITECTURES {
        let Some(compiler) = compiler("kernels_that_spill_are_caught", architecture) else {
            return;
        };
        for (name, source) in [("spills", SPILLS), ("stacks", STACK)] {
            let (_, log) = compiler.compile(name, source, &[]).unwrap();
            let faults = log_faults(&log);
            assert_eq!(faults.len(), 1, "{architecture} {faults:?}\n{log}");
            assert!(faults[0].starts_with(&format!("{name}: ")), "{faults:?}");
            let usage = &Usage::all(&log)[0];
            assert_eq!(usage.spill_bytes > 0, name == "spills", "{architecture} {usage:?}");
        }
        let (_, log) = compiler.compile("fine", TENSOR, &[("PLAIN", "0".to_owned())]).unwrap();
        assert!(log_faults(&log).is_empty(), "{architecture}: {log}");
    }
    assert!(!log_faults("").is_empty() && !log_faults("Compiling entry function").is_empty());
}

#[test]
fn kernels_without_tensor_cores_are_caught() {
    let test = "kernels_without_tensor_cores_are_caught";
    let Some(disassembler) = Disassembler::find(test) else { return };
    // The oldest and the newest: nvdisasm takes half a second to start.
    for architecture in [ARCHITECTURES[0], ARCHITECTURES[ARCHITECTURES.len() - 1]] {
        let Some(compiler) = compiler(test, architecture) else { return };
        for (plain, there) in [("0", true), ("1", false)] {
            let defines = [("PLAIN", plain.to_owned())];
            let (cubin, _) = compiler.compile("multiplies", TENSOR, &defines).unwrap();
            let listing = disassembler.listing(&cubin);
            assert_eq!(finds(&listing, "IMMA"), there, "{architecture}");
            assert!(!finds(&listing, "HMMA"), "{architecture}");
        }
    }
}

#[test]
fn kernels_that_do_not_wait_are_caught() {
    let test = "kernels_that_do_not_wait_are_caught";
    let Some(disassembler) = Disassembler::find(test) else { return };
    let Some(compiler) = compiler(test, "sm_90a") else { return };
    let waiting = "extern \"C\" __global__ void waits(int* x) { asm volatile(\"griddepcontrol.wait;\"); *x = 1; }\n";
    let all = format!("{waiting}extern \"C\" __global__ void hastes(int* x) {{ *x = 2; }}\n");
    let (cubin, _) = compiler.compile("waiting", &all, &[]).unwrap();
    assert_eq!(functions_without(&disassembler.listing(&cubin), "ACQBULK"), ["hastes"]);
}

#[test]
fn operands_that_are_overwritten_are_caught() {
    let code = |between: &str| {
        format!(
            "        /*0900*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, R152, gdesc[UR16], R24, gsb0 ;\n\
             \x20       /*0910*/              {between} ;\n\
             \x20       /*0920*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n\
             \x20       /*0930*/                   LDS.128 R152, [R229+0x4000] ;\n"
        )
    };
    for (between, faults) in [
        ("LDS.128 R148, [R229+0x4000]", 0),
        ("LDS.128 R152, [R229+0x4000]", 1),
        ("@!P0 LDS.64 R154, [R229]", 1),
        ("LDS.64 R150, [R229+0x4000]", 0),
        ("IMAD.WIDE.U32 R151, R2, 0x80, R4", 1),
        ("LOP3.LUT R156, R152, 0x7f0, RZ, 0xc0, !PT", 0),
        ("STS.128 [R152], R152", 0),
        ("IGMMA.64x128x32.S8.S8 R24, gdesc[UR4], R24", 0),
    ] {
        assert_eq!(overwritten(&code(between)).len(), faults, "{between}");
    }
}
