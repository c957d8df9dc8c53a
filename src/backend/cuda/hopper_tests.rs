//! The product on Hopper's tensor cores compared with the CPU's, over odd shapes, and its layouts there and back.

use half::f16;

use super::fused::{Columns, SiteCodes};
use super::quantization_tests::random_codes;
use super::tensor::{Activation, Layout, PackedForm};
use super::tests::{Random, device, site};
use super::*;
use crate::backend::cpu::Cpu;
use crate::backend::{Forward, Matrix, Memory, Quantization};
use crate::checkpoint::Dtype;
use crate::eval::product_error;
use crate::quant::codebook::Codebook;
use crate::quant::number::{LinearFormat, OutlierFormat};
use crate::quant::rows::{OutlierRows, QuantizedRows};
use crate::quant::site::{SiteFormat, Transform};

/// A device that has `wgmma`, with the switch on.
fn hopper(test: &str) -> Option<Cuda> {
    let mut cuda = device(test)?;
    if Narrow::of(cuda.gpu.device.capability) != Narrow::Wgmma {
        skipped(test, "the device has no wgmma");
        return None;
    }
    cuda.narrow = Narrow::Wgmma;
    Some(cuda)
}

/// A site and weights: channels, group, outliers, bits of activations and of weights, FP4.
type Shape = (usize, usize, usize, u8, u8, bool);

const SHAPES: [Shape; 17] = [
    (64, 64, 0, 4, 4, false),
    (128, 128, 0, 4, 4, false),
    (172, 32, 12, 4, 4, false),
    (172, 64, 0, 4, 3, false),
    (172, 128, 44, 3, 4, false),
    (576, 64, 64, 4, 4, true),
    (576, 32, 0, 2, 2, false),
    (576, 128, 32, 4, 4, true),
    (576, 128, 64, 8, 4, false),
    (576, 64, 64, 8, 8, false),
    (576, 32, 64, 8, 4, true),
    (576, 128, 0, 4, 8, false),
    (1100, 128, 200, 4, 4, false),
    (1100, 128, 150, 4, 4, false),
    (2048, 128, 128, 4, 8, false),
    (4096, 128, 128, 4, 4, false),
    (11008, 128, 128, 4, 4, false),
];

fn formats(
    (channels, group, outliers, act_bits, bits, fp4): Shape,
    rows_per_scale: usize,
    random: &mut Random,
) -> (SiteFormat, LinearFormat) {
    let transform = Transform::Hadamard;
    let outlier_format = OutlierFormat::Int8;
    let site = site(channels, group, outliers, transform, outlier_format, random)
        .with(|format| format.row.numbers.bits = act_bits);
    let codebook = |bits| if fp4 && bits == 4 { Codebook::Fp4 } else { Codebook::Int };
    let site = site.with(|site| site.row.numbers.codebook = codebook(act_bits));
    let weights = site.row.weights(bits, codebook(bits), rows_per_scale);
    (site, weights)
}

#[test]
fn products_in_tiles_are_the_cpus_bits_or_within_the_bound() {
    let Some(cuda) = hopper("products_in_tiles_are_the_cpus_bits_or_within_the_bound") else {
        return;
    };
    let mut random = Random(71);
    for (at, shape) in SHAPES.into_iter().enumerate() {
        let counts = [
            (1, 1),
            (1, 130),
            (8, 64),
            (9, 65),
            (16, 192),
            (17, 3),
            (33, 200),
            (64, 128),
            (65, 129),
            (129, 65),
            (300, 257),
        ];
        let counts = counts.into_iter().filter(|(tokens, _)| shape.0 < 4000 || *tokens <= 70);
        compare(&cuda, shape, 1 + at % 2, counts, &mut random);
    }
}

/// More tiles than multiprocessors, in more than one band; more stages than a ring holds.
#[test]
fn tiles_and_stages_come_round() {
    let Some(cuda) = hopper("tiles_and_stages_come_round") else { return };
    let mut random = Random(73);
    compare(&cuda, (576, 128, 64, 4, 4, false), 1, [(1100, 2570)], &mut random);
    // Enough tiles for those of 128 tokens; fewer, in the tests of all formats, are of 64.
    for shape in &SHAPES[5..12] {
        compare(&cuda, *shape, 2, [(1100, 2570)], &mut random);
    }
    let counts = [(8, 12_800), (16, 12_800), (32, 12_800), (64, 12_800)];
    compare(&cuda, (4096, 128, 128, 4, 4, false), 1, counts, &mut random);
    // Tiles of 192 rows, which a cluster divides.
    compare(&cuda, (1100, 128, 150, 4, 4, false), 1, [(32, 12_288), (64, 12_288)], &mut random);
}

#[test]
fn linears_multiplied_together_are_within_the_bound_of_each() {
    let Some(cuda) = hopper("linears_multiplied_together_are_within_the_bound_of_each") else {
        return;
    };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(79);
    for shape in [SHAPES[3], SHAPES[5], SHAPES[9], SHAPES[11], SHAPES[12]] {
        let (format, weights) = formats(shape, 1, &mut random);
        let site = cuda.site(&format).unwrap();
        for (tokens, all_rows) in [
            (1, &[64, 64][..]),
            (7, &[200, 65, 3]),
            (16, &[1, 700]),
            (32, &[1024, 256, 256]),
            (64, &[130, 2000, 64]),
            (65, &[130, 64]),
            (9, &[77]),
        ] {
            let what = format!("{tokens} x {all_rows:?}, {shape:?}");
            let x = random.activations(tokens, format.channels);
            let host = cpu.quantize(&cpu.upload(x.clone()).unwrap(), &format, "").unwrap();
            let on_device = cuda.quantize(&cuda.half_tensor(&x), &site, "").unwrap();
            let linears: Vec<_> =
                all_rows.iter().map(|rows| random_codes(&weights, *rows, &mut random)).collect();
            let packed: Vec<_> = linears
                .iter()
                .map(|linear| cuda.pack(&cuda.restore(linear.clone()).unwrap(), None).unwrap())
                .collect();
            let packed: Vec<_> = packed.iter().collect();
            let found = cuda.integer_products(&on_device, &packed).unwrap();
            assert_eq!(found.len(), linears.len());
            for (linear, found) in linears.iter().zip(&found) {
                let expected =
                    cpu.integer_product(&host, &cpu.pack(linear, None).unwrap()).unwrap();
                let found = cuda.values(found);
                let (_, fault) =
                    product_error(&host, linear, &found, expected.values(), Dtype::F16);
                assert_eq!(fault, None, "{what}");
            }
        }
    }
}

/// A site's products for so many tokens and rows.
fn compare(
    cuda: &Cuda,
    shape: Shape,
    rows_per_scale: usize,
    counts: impl IntoIterator<Item = (usize, usize)>,
    random: &mut Random,
) {
    let cpu = Cpu::new().unwrap();
    let (format, weights) = formats(shape, rows_per_scale, random);
    let site = cuda.site(&format).unwrap();
    for (tokens, rows) in counts {
        let linear = random_codes(&weights, rows, random);
        let x = random.activations(tokens, format.channels);
        let host = cpu.quantize(&cpu.upload(x.clone()).unwrap(), &format, "").unwrap();
        let expected = cpu.integer_product(&host, &cpu.pack(&linear, None).unwrap()).unwrap();
        let expected = expected.values();
        let what = format!("{tokens} x {rows}, {shape:?}");

        let rows_on_device = cuda.quantize(&cuda.half_tensor(&x), &site, "").unwrap();
        assert_eq!(rows_on_device.layout, Layout::Tiled, "{what}");
        assert!(cuda.rows_on_host(&rows_on_device) == host, "codes of {what}");
        let packed = cuda.pack(&cuda.restore(linear.clone()).unwrap(), None).unwrap();
        assert!(matches!(packed.form, PackedForm::Blocks(_)), "{what}");

        let float = |rows| {
            let found = cuda.integer(rows, &packed, false).unwrap();
            found.download::<f32>(0..4 * tokens * linear.rows).unwrap()
        };
        let found = float(&rows_on_device);
        if tokens > 64 {
            assert!(found == expected, "{what}: bits");
        } else {
            let (_, fault) = product_error(&host, &linear, &found, expected, Dtype::F32);
            assert_eq!(fault, None, "{what}");
        }
        assert!(float(&rows_on_device) == found, "{what}: again");
        // From rows as another kernel makes them.
        let plain = cuda.restore_rows(&host).unwrap();
        assert_eq!(plain.layout, Layout::RowMajor);
        assert!(float(&plain) == found, "{what}: from rows");
        let halves: Vec<f32> = found.iter().map(|v| f16::from_f32(*v).to_f32()).collect();
        let tensor = cuda.integer_product(&rows_on_device, &packed).unwrap();
        assert!(cuda.values(&tensor) == halves, "{what}: f16");
        let before = Matrix {
            rows: tokens,
            columns: linear.rows,
            data: random.values(tokens * linear.rows),
        };
        let mut sums = cuda.upload(before.clone()).unwrap();
        cuda.add_integer_product(&mut sums, &rows_on_device, &packed).unwrap();
        let expected: Vec<f32> = before.data.iter().zip(&found).map(|(x, y)| x + y).collect();
        assert!(cuda.values(&sums) == expected, "{what}: added");
    }
}

/// Gate and up with their rows in the order of the site after them yield the same codes as without.
#[test]
fn rows_in_the_order_of_the_next_site_change_no_code() {
    let Some(cuda) = hopper("rows_in_the_order_of_the_next_site_change_no_code") else { return };
    let mut random = Random(75);
    let shapes = [
        ((576, 128, 32, 4, 4, false), (1100, 128, 150, 4, 4, false)),
        ((576, 64, 64, 4, 4, true), (172, 32, 12, 4, 4, false)),
        ((172, 32, 12, 4, 4, false), (576, 128, 0, 4, 8, false)),
    ];
    for (at, (shape, next)) in shapes.into_iter().enumerate() {
        let (format, weights) = formats(shape, 1 + at % 2, &mut random);
        let (next, _) = formats(next, 1, &mut random);
        let [site, next] = [&format, &next].map(|format| cuda.site(format).unwrap());
        let linears = [(); 2].map(|()| random_codes(&weights, next.format.channels, &mut random));
        // With fewer tokens sums may be split in another way.
        for tokens in [65, 130] {
            let mut x = random.activations(tokens, format.channels);
            // So that products of gate and up stay within f16.
            x.data.iter_mut().for_each(|value| *value /= 256.0);
            let x = cuda.quantize(&cuda.half_tensor(&x), &site, "").unwrap();
            let [in_slots, in_channels] = [Some(&next), None].map(|feeds| {
                linears.each_ref().map(|linear| {
                    let quantized = cuda.restore(linear.clone()).unwrap();
                    cuda.integer_product(&x, &cuda.pack(&quantized, feeds).unwrap()).unwrap()
                })
            });
            assert!(in_slots[0].slots.is_some() && in_channels[0].slots.is_none());
            let codes = |[gate, up]: &[Activation; 2]| {
                let columns = if gate.slots.is_some() { Columns::Slots } else { Columns::Channels };
                let codes = SiteCodes { site: &next, layout: Layout::Tiled, name: "" };
                let rows = cuda.silu_rows(gate, up, columns, codes);
                cuda.rows_on_host(&rows.unwrap().unwrap())
            };
            let expected = codes(&in_channels);
            assert!(codes(&in_slots) == expected, "{tokens} of {shape:?}: codes");
            let values =
                |[gate, up]: [Activation; 2]| cuda.values(&cuda.silu_mul(gate, &up).unwrap());
            let all = linears.each_ref().map(|linear| {
                let quantized = cuda.restore(linear.clone()).unwrap();
                cuda.integer_product(&x, &cuda.pack(&quantized, Some(&next)).unwrap()).unwrap()
            });
            let [gate, up] = all;
            let fused = cuda.silu_quantize(gate, &up, &next, "").unwrap();
            assert!(cuda.rows_on_host(&fused) == expected, "{tokens} of {shape:?}: chosen");
            assert!(values(in_slots) == values(in_channels), "{tokens} of {shape:?}: values");
        }
    }
}

/// Groups of very different scales next to each other: no product of scales may lose bits to a larger one.
#[test]
fn scales_far_apart_are_multiplied_exactly() {
    let Some(cuda) = hopper("scales_far_apart_are_multiplied_exactly") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(74);
    let (format, weights) = formats((2048, 128, 0, 4, 4, false), 1, &mut random);
    let mut linear = random_codes(&weights, 70, &mut random);
    let far = |random: &mut Random| {
        let mantissa = 1.0 + (random.next() % 1024) as f32 / 1024.0;
        f16::from_f32(mantissa * 2f32.powi((random.next() % 20) as i32 - 13))
    };
    linear.scales.iter_mut().for_each(|scale| *scale = far(&mut random));
    let x = random.activations(100, format.channels);
    let mut host = cpu.quantize(&cpu.upload(x).unwrap(), &format, "").unwrap();
    host.scales.iter_mut().for_each(|scale| *scale = far(&mut random).to_f32());
    let expected = cpu.integer_product(&host, &cpu.pack(&linear, None).unwrap()).unwrap();
    let packed = cuda.pack(&cuda.restore(linear.clone()).unwrap(), None).unwrap();
    let rows = cuda.restore_rows(&host).unwrap();
    let found = cuda.integer(&rows, &packed, false).unwrap();
    assert!(found.download::<f32>(0..4 * 100 * 70).unwrap() == expected.values());
}

/// Every count of tokens from 1 to 300, with scales that are powers of two: whatever the order, every sum is exact.
#[test]
fn every_count_of_tokens_gives_exact_sums() {
    let Some(cuda) = hopper("every_count_of_tokens_gives_exact_sums") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(72);
    let (format, weights) = formats((576, 64, 64, 4, 4, false), 1, &mut random);
    let mut linear = random_codes(&weights, 200, &mut random);
    let power = |random: &mut Random| f16::from_f32(2f32.powi((random.next() % 5) as i32 - 6));
    linear.scales.iter_mut().for_each(|scale| *scale = power(&mut random));
    if let crate::quant::linear::OutlierBlock::Int8 { scales, .. } = &mut linear.outliers {
        scales.iter_mut().for_each(|scale| *scale = power(&mut random));
    }
    let packed = cuda.pack(&cuda.restore(linear.clone()).unwrap(), None).unwrap();
    let packed_host = cpu.pack(&linear, None).unwrap();
    let x = random.activations(300, format.channels);
    let mut all = cpu.quantize(&cpu.upload(x).unwrap(), &format, "").unwrap();
    all.scales.iter_mut().for_each(|scale| *scale = power(&mut random).to_f32());
    if let OutlierRows::Int8 { scales, .. } = &mut all.outliers {
        scales.iter_mut().for_each(|scale| *scale = power(&mut random).to_f32());
    }
    // All codes of the first token are the greatest magnitude.
    let width = all.format.grouped_channels();
    all.codes[..width].fill(-8);
    for tokens in 1..=300 {
        let host = first_tokens(&all, tokens);
        let expected = cpu.integer_product(&host, &packed_host).unwrap();
        let rows = cuda.restore_rows(&host).unwrap();
        let found = cuda.integer(&rows, &packed, false).unwrap();
        let found = found.download::<f32>(0..4 * tokens * linear.rows).unwrap();
        assert!(found == expected.values(), "{tokens} tokens");
    }
    // A planted error is seen.
    let mut wrong = first_tokens(&all, 5);
    wrong.codes[7] += 1;
    let right = cpu.integer_product(&first_tokens(&all, 5), &packed_host).unwrap();
    let rows = cuda.restore_rows(&wrong).unwrap();
    let found = cuda.integer(&rows, &packed, false).unwrap();
    assert!(found.download::<f32>(0..4 * 5 * linear.rows).unwrap() != right.values());
}

fn first_tokens(all: &QuantizedRows, tokens: usize) -> QuantizedRows {
    let mut rows = all.clone();
    rows.tokens = tokens;
    rows.codes.truncate(tokens * all.format.grouped_channels());
    rows.scales.truncate(tokens * all.format.groups);
    if let OutlierRows::Int8 { codes, scales } = &mut rows.outliers {
        codes.truncate(tokens * all.format.outlier_channels);
        scales.truncate(tokens);
    }
    rows
}
