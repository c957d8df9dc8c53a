/*! Values of flags: what each accepts, and the sentence that refuses the rest. */

use std::num::IntErrorKind;
use std::str::FromStr;

use clap::builder::{PossibleValuesParser, TypedValueParser};

use crate::bench::Batch;
use crate::checkpoint::Dtype;
use crate::export::{self, Format, MatrixType};

/// A format of `atom export`.
pub(crate) fn export_format() -> impl TypedValueParser<Value = &'static dyn Format> {
    let names = export::FORMATS.iter().map(|format| format.name());
    PossibleValuesParser::new(names)
        .map(|name| export::find(&name).expect("the parser takes names of formats only"))
}

/// A type of matrices in a GGUF file.
pub(crate) fn matrix_type(text: &str) -> Result<MatrixType, String> {
    match text.to_ascii_lowercase().as_str() {
        "f16" => Ok(MatrixType::F16),
        "q8_0" => Ok(MatrixType::Q8_0),
        _ => Err("the types are f16 and q8_0".to_owned()),
    }
}

/// A type of two bytes.
pub(crate) fn half(text: &str) -> Result<Dtype, String> {
    match text {
        "f16" | "fp16" | "float16" => Ok(Dtype::F16),
        "bf16" | "bfloat16" => Ok(Dtype::BF16),
        _ => Err("the types are f16 and bf16".to_owned()),
    }
}

/// A count of at least 1.
pub(crate) fn count(text: &str) -> Result<usize, String> {
    at_least(text, 1)
}

/// Threads, at most four for each processor of this machine, and 256 on any: more of them only take
/// memory and time to start.
pub(crate) fn threads(text: &str) -> Result<usize, String> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let most = (4 * processors).max(256);
    match at_least(text, 0)? {
        number if number <= most => Ok(number),
        _ => Err(format!(
            "at most {most} threads on this machine, which has {processors} processors"
        )),
    }
}

/// A count of at least 1 and at most a million: what only a slip of the finger exceeds.
pub(crate) fn small_count(text: &str) -> Result<usize, String> {
    match count(text)? {
        number if number <= 1_000_000 => Ok(number),
        _ => Err("it must be at most 1000000".to_owned()),
    }
}

/// A window's length of `bench`, which makes the window itself.
pub(crate) fn small_window(text: &str) -> Result<usize, String> {
    window_length(text).and_then(|_| small_count(text))
}

/// How many channels are outliers.
pub(crate) fn outliers(text: &str) -> Result<usize, String> {
    at_least(text, 0)
}

/// A window's length: at least 2 tokens, so that one is predicted from another.
pub(crate) fn window_length(text: &str) -> Result<usize, String> {
    at_least(text, 2)
}

fn at_least(text: &str, least: usize) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(number) if number < least => Err(format!("it must be at least {least}")),
        // Products of two of them still fit 64 bits.
        Ok(number) if number <= MOST => Ok(number),
        Ok(_) => Err(format!("it must be at most {MOST}")),
        Err(error) if *error.kind() == IntErrorKind::PosOverflow => {
            Err(format!("it must be at most {MOST}"))
        }
        Err(_) => Err("it must be a whole number".to_owned()),
    }
}

/// The most that any count may be.
const MOST: usize = u32::MAX as usize;

/// A perplexity, which is never below 1.
pub(crate) fn perplexity(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number >= 1.0 && number.is_finite() => Ok(number),
        _ => Err("a perplexity is a number of at least 1".to_owned()),
    }
}

/// An average of bits a weight.
pub(crate) fn target_bits(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok(number),
        _ => Err("it must be an average of bits such as 4.5".to_owned()),
    }
}

/// Bits of a weight.
pub(crate) fn width(text: &str) -> Result<u8, String> {
    match text.parse() {
        Ok(bits @ (2 | 3 | 4 | 8 | 16)) => Ok(bits),
        _ => Err("the widths are 2, 3, 4, 8 and 16".to_owned()),
    }
}

/// A relative increase: 0.1 is 10 %.
pub(crate) fn increase(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number >= 0.0 && number.is_finite() => Ok(number),
        _ => Err("it must be a ratio of at least 0; 0.1 allows 10 % more".to_owned()),
    }
}

/// A recipe key and its value, as a line of a recipe file; a bare word is a string.
pub(crate) fn assignment(text: &str) -> Result<(String, toml::Value), String> {
    let (key, value) = text.split_once('=').ok_or("it must be KEY=VALUE")?;
    let (key, value) = (key.trim().to_owned(), value.trim());
    let line = |value: &str| format!("value = {value}").parse::<toml::Table>().ok();
    let parsed = line(value).and_then(|mut table| table.remove("value"));
    Ok((key, parsed.unwrap_or_else(|| toml::Value::String(value.to_owned()))))
}

/// A whole number of channels, or `row`, in the form the recipe's key `group` has.
pub(crate) fn group(text: &str) -> Result<toml::Value, String> {
    if text == "row" || text == "auto" {
        return Ok(toml::Value::String(text.to_owned()));
    }
    text.parse().map(toml::Value::Integer).map_err(|_| {
        "it must be a number of channels, `row` for one scale a row, or `auto`".to_owned()
    })
}

/// How many channels of a site are outliers, as a recipe has them.
pub(crate) fn recipe_outliers(text: &str) -> Result<toml::Value, String> {
    if text == "auto" {
        return Ok(toml::Value::String(text.to_owned()));
    }
    let number = text.parse::<u32>().map(|number| toml::Value::Integer(number.into()));
    number.map_err(|_| "it must be a number of channels, or `auto`".to_owned())
}

/// Where arithmetic runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    /// The fastest there is.
    Auto,
    Cpu,
    /// The CUDA device of that number.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => return Ok(Self::Auto),
            "cpu" => return Ok(Self::Cpu),
            "cuda" => return Ok(Self::Cuda(0)),
            _ => {}
        }
        text.strip_prefix("cuda:")
            .and_then(|number| number.parse().ok())
            .map(Self::Cuda)
            .ok_or_else(|| "the devices are auto, cpu, cuda and cuda:N".to_owned())
    }
}

/// A temperature: at 0 the most probable token is taken.
pub(crate) fn temperature(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        // Below the least one, exponents of logits would overflow.
        Ok(number) if number == 0.0 || (1e-3..=1e3).contains(&number) => Ok(number),
        _ => {
            Err("it must be 0, for the most probable token, or lie between 0.001 and 1000"
                .to_owned())
        }
    }
}

/// What the learning rates of distillation are multiplied by.
pub(crate) fn rate_factor(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(factor) if (0.01..=100.0).contains(&factor) => Ok(factor),
        _ => Err("it must lie between 0.01 and 100".to_owned()),
    }
}

/// A probability above 0.
pub(crate) fn top_p(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number <= 1.0 => Ok(number),
        _ => Err("it must be a probability above 0 and at most 1".to_owned()),
    }
}

/// A share of a probability.
pub(crate) fn min_p(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if (0.0..1.0).contains(&number) => Ok(number),
        _ => Err("it must be 0 or more and less than 1".to_owned()),
    }
}

/// How many of the most probable tokens are drawn among.
pub(crate) fn top_k(text: &str) -> Result<usize, String> {
    at_least(text, 0)
}

/// A number of bytes, such as `24GB` or `512MiB`.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "" | "B" => 1.0,
        "MB" => 1e6,
        "GB" => 1e9,
        "MiB" => f64::from(1 << 20),
        "GiB" => f64::from(1 << 30),
        _ => return Err("the units are B, MB, GB, MiB and GiB".to_owned()),
    };
    match digits.parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok((number * factor) as u64),
        _ => Err("it must be a size such as 24GB".to_owned()),
    }
}

/// auto, max or a number of sequences.
pub(crate) fn batch(text: &str) -> Result<Batch, String> {
    match text {
        "auto" => Ok(Batch::Auto),
        "max" => Ok(Batch::Max),
        number => small_count(number).map(Batch::Of),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_ratios_refuse_what_means_nothing() {
        assert_eq!(count("8"), Ok(8));
        assert!(count("0").is_err() && count("-1").is_err() && count("x").is_err());
        assert!(window_length("1").is_err());
        for beyond in
            ["4294967296", "9223372036854775808", "18446744073709551616", "1000000000000000000"]
        {
            assert_eq!(count(beyond), Err("it must be at most 4294967295".to_owned()));
            assert!(window_length(beyond).is_err() && small_count(beyond).is_err());
            assert!(threads(beyond).unwrap_err().contains("at most"));
        }
        assert_eq!((threads("0"), threads("256")), (Ok(0), Ok(256)));
        assert!(threads("10000").unwrap_err().starts_with("at most"));
        assert!(perplexity("0.5").is_err() && perplexity("nan").is_err());
        assert!(perplexity("inf").is_err());
        assert_eq!(increase("0.1"), Ok(0.1));
        assert!(increase("-0.1").is_err());
        assert_eq!(target_bits("4.25"), Ok(4.25));
        assert!(target_bits("0").is_err() && target_bits("inf").is_err());
        assert_eq!((temperature("0"), temperature("0.7")), (Ok(0.0), Ok(0.7)));
        assert!(temperature("-1").is_err() && temperature("1e-9").is_err());
        assert!(temperature("nan").is_err());
        assert_eq!((rate_factor("2"), rate_factor("0.01")), (Ok(2.0), Ok(0.01)));
        assert!(["0", "-1", "nan", "inf", "101"].iter().all(|text| rate_factor(text).is_err()));
        assert!(top_p("0").is_err() && top_p("1.1").is_err() && top_p("1").is_ok());
        assert!(min_p("1").is_err() && min_p("0").is_ok() && top_k("0").is_ok());
        assert_eq!((width("16"), width("3")), (Ok(16), Ok(3)));
        assert!(width("5").is_err());
    }

    #[test]
    fn devices_and_sizes_are_parsed() {
        assert_eq!("auto".parse(), Ok(Device::Auto));
        assert_eq!("cuda:3".parse(), Ok(Device::Cuda(3)));
        assert!("cuda:".parse::<Device>().is_err() && "tpu".parse::<Device>().is_err());
        assert_eq!((bytes("24GB"), bytes("1.5GiB")), (Ok(24_000_000_000), Ok(1_610_612_736)));
        assert!(bytes("24").is_ok() && bytes("0GB").is_err() && bytes("3kB").is_err());
    }
}
