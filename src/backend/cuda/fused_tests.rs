//! Codes made in one kernel compared with those of the CPU's separate steps, bit by bit, over odd shapes.

use half::f16;

use super::fused::{Columns, SiteCodes};
use super::tensor::{Activation, DeviceRows, DeviceSite, Layout};
use super::tests::{Random, device, site};
use super::*;
use crate::backend::cpu::Cpu;
use crate::backend::{Forward, Matrix, Memory, Quantization};
use crate::quant::codebook::Codebook;
use crate::quant::number::{NumberFormat, OutlierFormat, ScaleFormat};
use crate::quant::rows::QuantizedRows;
use crate::quant::scale::ScaleGrid;
use crate::quant::site::{PADDING, SiteFormat, Transform};

const EPSILON: f32 = 1e-5;

/// Sites that the kernels take: all groups, formats and widths of code, full and partial panels.
fn sites(random: &mut Random) -> Vec<SiteFormat> {
    use Transform::{Hadamard, None};
    [
        (64, 64, 0, 4, Hadamard),
        (172, 32, 12, 3, Hadamard),
        (172, 128, 0, 4, None),
        (576, 64, 64, 4, Hadamard),
        (576, 32, 0, 2, None),
        (576, 128, 32, 8, Hadamard),
        (1100, 128, 200, 4, Hadamard),
        (1000, 64, 40, 8, None),
        (4096, 128, 128, 4, Hadamard),
        (4096, 64, 0, 3, Hadamard),
        (11008, 128, 256, 4, Hadamard),
    ]
    .into_iter()
    .enumerate()
    .map(|(at, (channels, group, outliers, bits, transform))| {
        let outlier_format = OutlierFormat::Int8;
        let format = site(channels, group, outliers, transform, outlier_format, random);
        let codebook = if bits == 4 && at % 3 == 2 { Codebook::Fp4 } else { Codebook::Int };
        let scale = format.row.numbers.scale;
        let scale = match at % 4 {
            1 => ScaleFormat { grid: ScaleGrid::E4m3, exponent: -8, ..scale },
            2 => ScaleFormat { grid: ScaleGrid::PowerOfTwo, ..ScaleFormat::F16 },
            3 => ScaleFormat { grid: ScaleGrid::Bf16, ..scale },
            _ => scale,
        };
        format.with(|format| {
            format.row.numbers.bits = bits;
            format.row.numbers.codebook = codebook;
            format.row.numbers.scale = scale;
        })
    })
    .collect()
}

/// All sites with few tokens.
fn few(random: &mut Random) -> impl Iterator<Item = (SiteFormat, Vec<usize>)> + use<> {
    sites(random).into_iter().map(|format| (format, vec![1, 7, 8, 9, 65, 128, 129, 131]))
}

/// A site with many tokens, or of an odd width.
fn large(channels: usize, tokens: usize, random: &mut Random) -> (SiteFormat, Vec<usize>) {
    let format = site(channels, 128, 100, Transform::Hadamard, OutlierFormat::Int8, random);
    (format, vec![tokens])
}

/// The bits that the CPU and a kernel make, in both layouts. A kernel may have no room for a row only where shared memory is
/// scarce.
fn compare(
    cuda: &Cuda,
    format: &SiteFormat,
    expected: &QuantizedRows,
    what: &str,
    make: impl Fn(&DeviceSite, Layout) -> Option<DeviceRows>,
) {
    let site = cuda.site(format).unwrap();
    for layout in [Layout::RowMajor, Layout::Tiled] {
        let Some(rows) = make(&site, layout) else {
            assert!(cuda.gpu.block_shared_bytes < 150 << 10, "{what}: no room");
            continue;
        };
        assert!(cuda.rows_on_host(&rows) == *expected, "{what}, {layout:?}");
    }
}

fn what(tokens: usize, format: &SiteFormat) -> String {
    let SiteFormat { channels, row, .. } = format;
    let NumberFormat { group_size, bits, codebook, scale } = row.numbers;
    let outlier_channels = row.outlier_channels;
    format!(
        "{tokens} of {channels} in {group_size}, {outlier_channels}, {bits} bits {codebook:?}, {scale:?}"
    )
}

#[test]
fn codes_after_a_norm_are_the_cpus_bits() {
    let Some(cuda) = device("codes_after_a_norm_are_the_cpus_bits") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(21);
    // Many rows go round the ring of stages; rows that are no full quads are staged one by one.
    let more = [large(4096, 1700, &mut random), large(1102, 9, &mut random)];
    for (format, counts) in few(&mut random).chain(more) {
        for tokens in counts {
            let mut x = random.activations(tokens, format.channels);
            // Hidden states have all bits of f32.
            x.data.iter_mut().for_each(|value| *value *= 1.234_567);
            let weight =
                Matrix { rows: 1, columns: format.channels, data: random.values(format.channels) };
            let host = cpu.upload(x.clone()).unwrap();
            let norm = cpu.rms_norm(&host, &cpu.upload(weight.clone()).unwrap(), EPSILON).unwrap();
            let expected = cpu.quantize(&norm, &format, "").unwrap();
            let (x, weight) = (cuda.upload(x).unwrap(), cuda.upload(weight).unwrap());
            compare(&cuda, &format, &expected, &what(tokens, &format), |site, layout| {
                cuda.norm_rows(&x, &weight, EPSILON, SiteCodes { site, layout, name: "" }).unwrap()
            });
        }
    }
}

#[test]
fn codes_of_halves_are_the_cpus_bits() {
    let Some(cuda) = device("codes_of_halves_are_the_cpus_bits") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(22);
    let more = [large(4096, 3300, &mut random), large(172, 2100, &mut random)];
    for (format, counts) in few(&mut random).chain(more) {
        for tokens in counts {
            let mut x = random.activations(tokens, format.channels);
            x.data[..format.channels.min(40)].fill(0.0);
            let expected = cpu.quantize(&cpu.upload(x.clone()).unwrap(), &format, "").unwrap();
            let x = cuda.half_tensor(&x);
            compare(&cuda, &format, &expected, &what(tokens, &format), |site, layout| {
                cuda.half_rows(&x, SiteCodes { site, layout, name: "" }).unwrap()
            });
        }
    }
}

/// Columns in the site's order, zeros for padding.
fn in_places(x: &Matrix, format: &SiteFormat) -> Matrix {
    let pick =
        |row: &[f32], channel: i32| if channel == PADDING { 0.0 } else { row[channel as usize] };
    let rows = x.data.chunks(x.columns);
    let data = rows.flat_map(|row| format.order.iter().map(move |&channel| pick(row, channel)));
    Matrix { rows: x.rows, columns: format.width(), data: data.collect() }
}

#[test]
fn codes_of_gate_and_up_are_the_cpus_bits() {
    let Some(cuda) = device("codes_of_gate_and_up_are_the_cpus_bits") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(23);
    let more = [large(11008, 600, &mut random)];
    for (format, counts) in few(&mut random).chain(more) {
        for tokens in counts {
            let gate = random.activations(tokens, format.channels);
            let mut up = random.activations(tokens, format.channels);
            // No product's scale is beyond f16.
            up.data.iter_mut().for_each(|v| *v = f16::from_f32(*v / 16.0).to_f32());
            let product =
                cpu.silu_mul(cpu.upload(gate.clone()).unwrap(), &cpu.upload(up.clone()).unwrap());
            let expected = cpu.quantize(&product.unwrap(), &format, "").unwrap();
            for columns in [Columns::Channels, Columns::Slots] {
                let [gate, up] = [&gate, &up].map(|x| match columns {
                    Columns::Channels => cuda.half_tensor(x),
                    Columns::Slots => cuda.half_tensor(&in_places(x, &format)),
                });
                let what = format!("{}, {columns:?}", what(tokens, &format));
                compare(&cuda, &format, &expected, &what, |site, layout| {
                    cuda.silu_rows(&gate, &up, columns, SiteCodes { site, layout, name: "" })
                        .unwrap()
                });
            }
        }
    }
}

/// A group for each gate that f16 has, with a product that 8 bits and the scale show.
#[test]
fn every_gate_has_the_cpus_bits() {
    let Some(cuda) = device("every_gate_has_the_cpus_bits") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(24);
    let format = site(4096, 32, 0, Transform::None, OutlierFormat::Int8, &mut random)
        .with(|format| format.row.numbers.bits = 8);
    let gates = (0..=u16::MAX).map(f16::from_bits).filter(|gate| gate.is_finite());
    let mut data = vec![0.0; 512 * 4096];
    // The order spreads a row's channels over its groups; one in 32 is not zero.
    for (at, gate) in gates.enumerate() {
        let (row, group) = (at / 128, at % 128);
        data[row * 4096 + format.order[32 * group + at % 32] as usize] = gate.to_f32();
    }
    let gate = Matrix { rows: 512, columns: 4096, data };
    let up = Matrix { rows: 512, columns: 4096, data: vec![0.75; 512 * 4096] };
    let product = cpu.silu_mul(cpu.upload(gate.clone()).unwrap(), &cpu.upload(up.clone()).unwrap());
    let expected = cpu.quantize(&product.unwrap(), &format, "").unwrap();
    let (gate, up) = (cuda.half_tensor(&gate), cuda.half_tensor(&up));
    compare(&cuda, &format, &expected, "every gate", |site, layout| {
        cuda.silu_rows(&gate, &up, Columns::Channels, SiteCodes { site, layout, name: "" }).unwrap()
    });
}

#[test]
fn the_first_row_that_is_not_sound_is_named() {
    let Some(cuda) = device("the_first_row_that_is_not_sound_is_named") else { return };
    let mut random = Random(25);
    let format = &sites(&mut random)[3];
    let site = cuda.site(format).unwrap();
    let columns = format.channels;
    let fine = random.activations(40, columns);
    let ones = cuda.upload(Matrix { rows: 1, columns, data: vec![1.0; columns] }).unwrap();
    let weight = ones;
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = fine.clone();
        for row in [33, 17] {
            x.data[row * columns + 5 * row] = value;
        }
        let (float, half) = (cuda.upload(x.clone()).unwrap(), cuda.half_tensor(&x));
        let up = cuda.half_tensor(&fine);
        let codes = SiteCodes { site: &site, layout: Layout::Tiled, name: "this" };
        let check = |run: &dyn Fn(SiteCodes<'_>) -> Result<Option<DeviceRows>>| {
            run(codes).unwrap().unwrap();
            let error = cuda.wait().err().unwrap();
            assert!(error.message().contains("of this: "), "{error}");
            assert!(error.message().contains("token 17 "), "{error}");
        };
        check(&|codes| cuda.norm_rows(&float, &weight, EPSILON, codes));
        check(&|codes| cuda.half_rows(&half, codes));
        let columns = Columns::Channels;
        check(&|codes| cuda.silu_rows(&half, &up, columns, codes));
        check(&|codes| cuda.silu_rows(&up, &half, columns, codes));
    }
}

#[test]
fn what_the_kernels_do_not_take_is_left_to_others() {
    let Some(cuda) = device("what_the_kernels_do_not_take_is_left_to_others") else { return };
    let mut random = Random(26);
    use OutlierFormat::{F16, Fp8, Int8};
    for (group, outliers, outlier_format) in
        [(48, 0, Int8), (256, 4, Int8), (64, 4, F16), (64, 4, Fp8), (64, 257, Int8)]
    {
        let format = site(1000, group, outliers, Transform::None, outlier_format, &mut random);
        let site = cuda.site(&format).unwrap();
        let x: Activation = cuda.half_tensor(&random.activations(3, 1000));
        let codes = SiteCodes { site: &site, layout: Layout::Tiled, name: "" };
        assert!(cuda.half_rows(&x, codes).unwrap().is_none());
    }
}
