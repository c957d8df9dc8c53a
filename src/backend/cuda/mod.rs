/*! The CUDA backend: kernels compiled at run time for the device at hand, products by cuBLASLt.

The program links to nothing of CUDA and runs where nothing of it is installed: every library is
opened when a CUDA device is asked for, and what is missing then is an error that says so.

Hidden states are f32 and every other activation is f16; products have f32 sums. Codes, scales and the
integer product are those of the CPU, bit for bit, for the same activations. */

mod attention;
pub mod cache;
#[cfg(test)]
mod cache_tests;
pub mod compile;
mod drift;
mod faults;
mod fused;
#[cfg(test)]
mod fused_tests;
mod gptq;
pub mod gpu;
mod hessian;
mod hopper;
#[cfg(test)]
mod hopper_tests;
mod integer;
pub mod kernels;
mod launch;
pub mod libraries;
mod loss;
pub mod measure;
pub mod product;
mod quantize;
mod search;
mod staging;
pub mod tensor;
#[cfg(test)]
mod tests;
pub mod timing;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use half::f16;

use super::{AttentionSpec, Backend, Damping, Drift, Matrix, Prediction, Unquantized};
use crate::checkpoint::{self, Dtype};
use crate::quant::levels::Levels;
use crate::quant::linear::QuantizedLinear;
use crate::quant::rows::QuantizedRows;
use crate::quant::site::SiteFormat;
use crate::{Error, Result};
use attention::RopeTables;
use compile::Compiler;
use fused::Columns;
use gpu::{Buffer, Gpu, Stream};
use integer::Narrow;
pub use integer::VARIABLE as NARROW_VARIABLE;
use launch::{Geometry, Kernels, arguments};
use product::{Operand, Precision, Product, Products};
use staging::Staging;
use tensor::{
    Cross, Data, Dense, Factor, Form, Hessian, Home, Layout, Packed, Places, Quantized, Resident,
    Rows, Site, Tensor, Weight,
};

/// Threads of a block in the kernels that do not say otherwise.
const THREADS: usize = 256;

/// A batch's activations inside a block, counted as f32: 16384 tokens of Llama-2-7B's widths, whose
/// products fill the largest devices.
const BATCH_BYTES: usize = 3_600_000_000;

/// A CUDA device.
pub struct Cuda {
    gpu: Arc<Gpu>,
    kernels: Kernels,
    products: Products,
    uploads: Mutex<Staging>,
    downloads: Mutex<Staging>,
    rope: Mutex<Option<RopeTables>>,
    /// What codes of 4 bits are multiplied by.
    narrow: Narrow,
    /// Bytes that hidden states take on the device while they are set aside.
    aside_bytes: Arc<AtomicU64>,
    /// Bytes that they may take.
    aside_limit_bytes: AtomicU64,
}

impl Cuda {
    /// Opens device number `ordinal`. `memory_bytes` bounds what is used of its memory; none for all
    /// that is free.
    ///
    /// # Errors
    /// A machine error that says what is missing: a driver, a library, the device, memory.
    pub fn open(ordinal: usize, memory_bytes: Option<u64>) -> Result<Self> {
        let device = libraries::device(ordinal)?;
        libraries::cublaslt()?;
        libraries::cusolver()?;
        let compiler = Compiler::for_device(&device)?;
        let setting = std::env::var(integer::VARIABLE).ok();
        let narrow = Narrow::chosen(device.capability, setting.as_deref());
        let gpu = Gpu::open(device, memory_bytes)?;
        Ok(Self {
            narrow,
            kernels: Kernels::new(Arc::clone(&gpu), compiler),
            products: Products::new(Arc::clone(&gpu))?,
            uploads: Mutex::new(Staging::new(Arc::clone(&gpu), Stream::Up)?),
            downloads: Mutex::new(Staging::new(Arc::clone(&gpu), Stream::Down)?),
            rope: Mutex::default(),
            aside_bytes: Arc::default(),
            aside_limit_bytes: AtomicU64::new(u64::MAX),
            gpu,
        })
    }

    fn launch(
        &self,
        family: &str,
        entry: &str,
        geometry: Geometry,
        arguments: &[launch::Argument],
    ) -> Result<()> {
        self.kernels.launch(family, &[], entry, geometry, arguments)
    }

    /// An f16 tensor whose values are still to be written.
    fn half(&self, rows: usize, columns: usize) -> Result<Tensor> {
        let data = Data::Half(self.gpu.alloc(2 * rows * columns)?);
        Ok(Tensor::new(rows, columns, data))
    }

    /// Checks a weight for values that are not finite, and with `to` converts it to f16.
    fn convert(&self, weight: &Weight, to: Option<&Buffer>, stream: Stream) -> Result<Option<u64>> {
        let count = weight.rows * weight.columns;
        let bad = self.gpu.alloc_on(stream, 8)?;
        bad.fill(0xff, stream)?;
        self.kernels.launch_on(
            stream,
            "elementwise",
            &[],
            &format!("convert_{}", weight.kind()),
            Geometry::line(count.div_ceil(THREADS * 16).clamp(1, 2048), THREADS),
            arguments![&*weight.data, count as i64, to, &bad],
        )?;
        let first = bad.download_on::<u64>(stream, 0..8)?[0];
        Ok((first != u64::MAX).then_some(first))
    }

    /// `x w^T` into `to` `[x's rows, w's rows]`, or added to it.
    fn multiply(
        &self,
        x: &Tensor,
        weight: &Dense,
        to: &Buffer,
        precision: Precision,
        add: bool,
    ) -> Result<()> {
        let rows = Part { first: 0, count: x.rows };
        self.multiply_part(x, rows, weight, to, precision, add)
    }

    /// The same for some rows of `x`, the first of which gives the first of `to`.
    fn multiply_part(
        &self,
        x: &Tensor,
        rows: Part,
        weight: &Dense,
        to: &Buffer,
        precision: Precision,
        add: bool,
    ) -> Result<()> {
        let operand = |pointer, transposed| Operand { pointer, stride: weight.columns, transposed };
        let x = x.half().pointer() + (2 * rows.first * weight.columns) as u64;
        self.products.run(&Product {
            m: weight.rows,
            n: rows.count,
            k: weight.columns,
            a: operand(weight.data.pointer(), true),
            b: operand(x, false),
            c: Operand { pointer: to.pointer(), stride: weight.rows, transposed: false },
            add,
            precision,
        })
    }
}

/// Some rows of a tensor.
#[derive(Clone, Copy)]
struct Part {
    first: usize,
    count: usize,
}

impl Backend for Cuda {
    type Tensor = Tensor;
    type Rows = Rows;
    type Weight<'a> = Weight;
    type Dense = Dense;
    type Quantized = Quantized;
    type Packed = Packed;
    type Site = Site;
    type Hessian = Hessian;
    type Cross = Cross;
    type Factor = Factor;

    const HALF: bool = true;

    fn device(&self) -> String {
        format!("cuda:{} ({})", self.gpu.device.ordinal, self.gpu.device.name)
    }

    fn batch_bytes(&self) -> usize {
        BATCH_BYTES
    }

    fn stream_bytes(&self) -> usize {
        usize::try_from(self.gpu.limit_bytes() / 2).unwrap_or(usize::MAX).min(16 << 30)
    }

    fn rows(&self, tensor: &Tensor) -> usize {
        tensor.rows
    }

    fn upload(&self, matrix: Matrix) -> Result<Tensor> {
        let Matrix { rows, columns, data } = matrix;
        Ok(Tensor::new(rows, columns, Data::Float(self.gpu.upload(&data)?)))
    }

    fn upload_activation(&self, matrix: Matrix) -> Result<Tensor> {
        let Matrix { rows, columns, data } = matrix;
        let halves: Vec<u16> = data.into_iter().map(|x| f16::from_f32(x).to_bits()).collect();
        Ok(Tensor::new(rows, columns, Data::Half(self.gpu.upload(&halves)?)))
    }

    fn download(&self, tensor: &Tensor) -> Result<Matrix> {
        let Tensor { rows, columns, .. } = *tensor;
        let count = tensor.count();
        let data = match &tensor.data {
            Data::Float(buffer) => buffer.download(0..4 * count)?,
            Data::Half(buffer) => {
                let halves = buffer.download::<u16>(0..2 * count)?;
                halves.into_iter().map(|bits| f16::from_bits(bits).to_f32()).collect()
            }
            Data::Aside(host) => bytemuck::cast_slice(&host.as_slice()[..4 * count]).to_vec(),
        };
        Ok(Matrix { rows, columns, data })
    }

    fn duplicate(&self, tensor: &Tensor) -> Result<Tensor> {
        let Tensor { rows, columns, .. } = *tensor;
        let bytes = 4 * tensor.count();
        let copy = self.gpu.alloc(bytes)?;
        match &tensor.data {
            Data::Float(buffer) => copy.copy_from(buffer, bytes)?,
            Data::Aside(host) => copy.copy_up(0, host, bytes, Stream::Main)?,
            Data::Half(_) => unreachable!("only hidden states are copied"),
        }
        Ok(Tensor::new(rows, columns, Data::Float(copy)))
    }

    fn reserve(&self, bytes: u64) -> Result<()> {
        let limit = self.gpu.limit_bytes();
        if bytes > limit {
            return Err(Error::machine(format!(
                "{} has too little memory: a block's work takes about {bytes} bytes, {limit} may be used",
                self.gpu.device.name
            ))
            .hint("end what else uses the GPU, raise --gpu-memory, or run with --device cpu"));
        }
        self.aside_limit_bytes.store(limit - bytes, Ordering::Relaxed);
        Ok(())
    }

    fn set_aside(&self, tensor: &mut Tensor) -> Result<()> {
        let bytes = 4 * tensor.count();
        if matches!(tensor.home, Home::Undecided) {
            let limit = self.aside_limit_bytes.load(Ordering::Relaxed);
            let resident = Resident::take(bytes as u64, &self.aside_bytes, limit);
            tensor.home =
                resident.map_or(Home::Host, |resident| Home::Device { _resident: resident });
        }
        if matches!(tensor.home, Home::Host) {
            let mut host = self.gpu.pinned(bytes)?;
            tensor.float().copy_down(0, &mut host, bytes, Stream::Main)?;
            self.gpu.wait(Stream::Main)?;
            tensor.data = Data::Aside(host);
        }
        Ok(())
    }

    fn recall(&self, tensor: &mut Tensor) -> Result<()> {
        if let Data::Aside(host) = &tensor.data {
            let bytes = 4 * tensor.count();
            let buffer = self.gpu.alloc(bytes)?;
            buffer.copy_up(0, host, bytes, Stream::Main)?;
            // The host's copy must stay until it is read.
            self.gpu.wait(Stream::Main)?;
            tensor.data = Data::Float(buffer);
        }
        Ok(())
    }

    fn load<'a>(&self, tensor: checkpoint::Tensor<'a>) -> Result<Weight> {
        tensor.read_ahead();
        let (rows, columns) = (tensor.shape[0], tensor.shape[1..].iter().product());
        let data = Arc::new(self.gpu.alloc_on(Stream::Up, tensor.bytes.len())?);
        self.uploads
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .upload(tensor.bytes, &data)?;
        tensor.release();
        let weight = Weight { rows, columns, dtype: tensor.dtype, data };
        match self.convert(&weight, None, Stream::Up)? {
            None => Ok(weight),
            // It says which value is wrong, and where.
            Some(_) => Err(tensor.check_finite(&|| Ok(())).err().unwrap_or_else(|| {
                Error::machine(format!("tensor `{}` changed on its way to the GPU", tensor.name))
            })),
        }
    }

    fn embed(&self, table: &Weight, tokens: &[u32]) -> Result<Tensor> {
        let (rows, columns) = (tokens.len(), table.columns);
        let y = self.gpu.alloc(4 * rows * columns)?;
        let tokens = self.gpu.upload(tokens)?;
        self.launch(
            "elementwise",
            &format!("embed_{}", table.kind()),
            Geometry::line(rows, THREADS),
            arguments![&*table.data, &tokens, columns, &y],
        )?;
        Ok(Tensor::new(rows, columns, Data::Float(y)))
    }

    fn select_rows(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        let (count, columns) = (rows.len(), x.columns);
        let (from, kind) = x.typed();
        let half = kind == "half";
        let to = self.gpu.alloc((if half { 2 } else { 4 }) * count * columns)?;
        let rows = self.gpu.upload(rows)?;
        self.launch(
            "elementwise",
            &format!("select_{kind}"),
            Geometry::line(count, THREADS),
            arguments![from, &rows, columns, &to],
        )?;
        let data = if half { Data::Half(to) } else { Data::Float(to) };
        Ok(Tensor::new(count, columns, data))
    }

    fn dense(&self, weight: &Weight, site: Option<&Site>) -> Result<Dense> {
        if let Some(site) = site {
            let data = Arc::new(self.arranged(weight, site, Precision::HalfToHalf)?);
            return Ok(Dense { rows: weight.rows, columns: site.format.width(), data });
        }
        let (rows, columns) = (weight.rows, weight.columns);
        if weight.dtype == Dtype::F16 {
            return Ok(Dense { rows, columns, data: Arc::clone(&weight.data) });
        }
        let data = Arc::new(self.gpu.alloc(2 * rows * columns)?);
        match self.convert(weight, Some(&data), Stream::Main)? {
            None => Ok(Dense { rows, columns, data }),
            Some(at) => Err(Error::machine(format!(
                "a weight of [{rows}, {columns}] is beyond f16 at row {}, column {}",
                at as usize / columns,
                at as usize % columns
            ))
            .hint("products on a GPU are in f16; run with --device cpu")),
        }
    }

    fn dense_of(&self, weight: &Quantized) -> Result<Dense> {
        let data = Arc::new(self.dequantized(weight, true)?);
        Ok(Dense { rows: weight.rows, columns: weight.format.row.width(), data })
    }

    fn packed(&self, weight: &Quantized, feeds: Option<&Site>) -> Result<Packed> {
        self.pack(weight, feeds)
    }

    fn check_levels(&self, levels: Levels) -> Result<()> {
        if levels == Levels::Fp4Bnb {
            return Err(Error::machine("the CUDA backend has no kernels for fp4-bnb codes")
                .hint("run with --device cpu, or quantize with --format fp4, which both have"));
        }
        Ok(())
    }

    fn site(&self, format: &SiteFormat) -> Result<Site> {
        if format.row.numbers.bits < 16 {
            self.check_levels(format.row.numbers.levels)?;
        }
        let places = self.places(format)?;
        let order = Arc::new(self.gpu.upload(&format.order)?);
        Ok(Site { format: format.clone(), order, places, norm: OnceLock::new() })
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor> {
        let y = self.half(x.rows, x.columns)?;
        self.launch(
            "elementwise",
            "rms_norm",
            Geometry::line(x.rows, THREADS),
            arguments![x.float(), weight.float(), x.columns, epsilon, y.half()],
        )?;
        Ok(y)
    }

    fn arrange(&self, x: &Tensor, site: &Site) -> Result<Tensor> {
        let (values, kind) = x.typed();
        let y = self.half(x.rows, site.format.width())?;
        self.arrange_rows(values.pointer(), kind, x.rows, site, y.half().pointer(), "half")?;
        Ok(y)
    }

    fn quantize(&self, x: &Tensor, site: &Site, name: &str) -> Result<Rows> {
        self.quantize_rows(x, site, name)
    }

    fn norm_quantize(
        &self,
        x: &Tensor,
        weight: &Tensor,
        epsilon: f32,
        site: &Site,
        name: &str,
    ) -> Result<Option<Rows>> {
        if !self.takes_tiles(&site.format.row) {
            return Ok(None);
        }
        self.norm_rows(x, weight, epsilon, site, Layout::Tiled, name)
    }

    fn silu_quantize(
        &self,
        gate: &Tensor,
        up: &Tensor,
        site: &Site,
        name: &str,
    ) -> Result<Option<Rows>> {
        if !self.takes_tiles(&site.format.row) {
            return Ok(None);
        }
        let columns = if gate.places.is_some() { Columns::Places } else { Columns::Channels };
        self.silu_rows(gate, up, columns, site, Layout::Tiled, name)
    }

    fn fetch_rows(&self, x: &Rows) -> Result<QuantizedRows> {
        self.fetched_rows(x)
    }

    fn restore_rows(&self, x: &QuantizedRows) -> Result<Rows> {
        self.restored_rows(x)
    }

    fn dequantize(&self, x: &Rows) -> Result<Tensor> {
        self.dequantize_rows(x)
    }

    fn product(&self, x: &Tensor, weight: &Dense) -> Result<Tensor> {
        let y = self.half(x.rows, weight.rows)?;
        self.multiply(x, weight, y.half(), Precision::HalfToHalf, false)?;
        Ok(y)
    }

    fn add_product(&self, x: &mut Tensor, y: &Tensor, weight: &Dense) -> Result<()> {
        self.multiply(y, weight, x.float(), Precision::HalfToFloat, true)
    }

    fn integer_product(&self, x: &Rows, weight: &Packed) -> Result<Tensor> {
        let data = Data::Half(self.integer(x, weight, true)?);
        let places = weight.places.clone();
        Ok(Tensor { places, ..Tensor::new(x.tokens, weight.rows, data) })
    }

    fn add_integer_product(&self, x: &mut Tensor, y: &Rows, weight: &Packed) -> Result<()> {
        // The other product's kernel has no such sum.
        if let (Form::Blocks(blocks), Layout::Tiled) = (&weight.form, y.layout)
            && kernels::is_for_many(y.tokens)
        {
            return self.tiled_product(y, blocks, weight.rows, x.float(), kernels::Output::Added);
        }
        let product = self.integer_product(y, weight)?;
        self.add(x, &product)
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) -> Result<()> {
        let count = x.count();
        self.launch(
            "elementwise",
            "add_half",
            Geometry::over(count.div_ceil(4), THREADS),
            arguments![x.float(), y.half(), count as i64],
        )
    }

    fn add_bias(&self, y: &mut Tensor, bias: &Tensor) -> Result<()> {
        self.launch(
            "elementwise",
            "add_bias_half",
            Geometry::line(y.rows, THREADS),
            arguments![y.half(), bias.float(), y.columns],
        )
    }

    fn head_norm(&self, x: &mut Tensor, weight: &Tensor, epsilon: f32) -> Result<()> {
        let heads = x.count() / weight.columns;
        self.launch(
            "elementwise",
            "head_norm",
            Geometry::line(heads.div_ceil(THREADS / 32), THREADS),
            arguments![x.half(), weight.float(), heads, weight.columns, epsilon],
        )
    }

    fn scale_rows(&self, x: &mut Tensor, weights: &[f32]) -> Result<()> {
        let shares = self.gpu.upload(weights)?;
        self.launch(
            "elementwise",
            "scale_rows_half",
            Geometry::line(x.rows, THREADS),
            arguments![x.half(), &shares, x.columns],
        )
    }

    fn add_rows(&self, x: &mut Tensor, y: &Tensor, rows: &[u32], weights: &[f32]) -> Result<()> {
        let (of, shares) = (self.gpu.upload(rows)?, self.gpu.upload(weights)?);
        self.launch(
            "elementwise",
            "add_rows_half",
            Geometry::line(rows.len(), THREADS),
            arguments![x.float(), y.half(), &of, &shares, x.columns],
        )
    }

    fn silu_mul(&self, gate: Tensor, up: &Tensor) -> Result<Tensor> {
        if let Some(Places { order, channels }) = &gate.places {
            assert!(up.places.is_some() && gate.columns == up.columns);
            let y = self.half(gate.rows, *channels)?;
            self.launch(
                "elementwise",
                "silu_mul_places",
                Geometry::line(gate.rows, THREADS),
                arguments![
                    gate.half_in_places(),
                    up.half_in_places(),
                    &**order,
                    gate.columns,
                    *channels,
                    y.half()
                ],
            )?;
            return Ok(y);
        }
        let count = gate.count();
        self.launch(
            "elementwise",
            "silu_mul_half",
            Geometry::over(count.div_ceil(8), THREADS),
            arguments![gate.half(), up.half(), count as i64],
        )?;
        Ok(gate)
    }

    fn attention(
        &self,
        spec: &AttentionSpec,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        key_mean: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.attend(spec, q, k, v, key_mean)
    }

    fn add_keys(&self, spec: &AttentionSpec, k: &Tensor, sums: &mut [f64]) -> Result<()> {
        self.sum_keys(spec, k, sums)
    }

    fn cross_entropy(
        &self,
        x: &Tensor,
        head: &Dense,
        tokens: &[u32],
        seq_len: usize,
    ) -> Result<Vec<f64>> {
        self.losses(x, head, tokens, seq_len)
    }

    fn predict(&self, x: &Tensor, head: &Dense, tokens: &[u32]) -> Result<Vec<Prediction>> {
        self.predictions(x, head, tokens)
    }

    fn row_changes(&self, x: &Tensor, original: &Tensor) -> Result<Vec<f64>> {
        self.changes(x, original)
    }

    fn divergence(&self, x: &Tensor, original: &Tensor, head: &Dense) -> Result<Vec<f64>> {
        self.divergences(x, original, head)
    }

    fn add_energy(&self, x: &Tensor, energy: &mut [f64]) -> Result<()> {
        self.energy(x, energy)
    }

    fn hessian(&self, channels: usize) -> Result<Hessian> {
        Ok(Hessian { n: channels, data: self.gpu.zeros(4 * channels * channels)? })
    }

    fn add_to_hessian(&self, hessian: &mut Hessian, x: &Tensor) -> Result<()> {
        self.accumulate(hessian, x)
    }

    fn difference(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let to = self.half(x.rows, x.columns)?;
        let (left, kind) = x.typed();
        let (right, same) = y.typed();
        assert!(kind == same && x.count() == y.count(), "the difference of unlike tensors");
        self.launch(
            "elementwise",
            &format!("difference_{kind}"),
            Geometry::over(x.count(), THREADS),
            arguments![left, right, x.count() as i64, to.half()],
        )?;
        Ok(to)
    }

    fn cross(&self, rows: usize, columns: usize) -> Result<Cross> {
        Ok(Cross { rows, columns, data: self.gpu.zeros(4 * rows * columns)? })
    }

    fn add_to_cross(&self, cross: &mut Cross, y: &Tensor, x: &Tensor) -> Result<()> {
        self.accumulate_cross(cross, y, x)
    }

    fn factor(&self, hessian: &mut Hessian, damping: f32) -> Result<Option<(Factor, Damping)>> {
        self.factorize(hessian, damping)
    }

    fn gptq(
        &self,
        linears: &[Unquantized<Weight>],
        site: &Site,
        hessian: &Hessian,
        factor: &Factor,
        drift: Option<&Drift<Cross>>,
    ) -> Result<Vec<(Quantized, f64)>> {
        let quantized = self.sweep_all(linears, site, factor, drift)?;
        let with_error = |(linear, quantized): (&Unquantized<Weight>, Quantized)| {
            let error = self.relative_error(hessian, site, linear.weight, &quantized)?;
            Ok((quantized, error))
        };
        linears.iter().zip(quantized).map(with_error).collect()
    }

    fn round(&self, linear: &Unquantized<Weight>, site: &Site) -> Result<Quantized> {
        self.round_to_nearest(linear, site)
    }

    fn output_error(
        &self,
        hessian: &Hessian,
        site: &Site,
        weight: &Weight,
        quantized: &Quantized,
    ) -> Result<f64> {
        self.relative_error(hessian, site, weight, quantized)
    }

    fn energy_error(
        &self,
        energy: &[f64],
        site: &Site,
        weight: &Weight,
        quantized: &Quantized,
    ) -> Result<f64> {
        self.relative_energy_error(energy, site, weight, quantized)
    }

    fn fetch(&self, weight: Quantized) -> Result<QuantizedLinear> {
        self.fetched(&weight)
    }

    fn restore(&self, weight: QuantizedLinear) -> Result<Quantized> {
        self.restored(&weight)
    }

    fn wait(&self) -> Result<()> {
        self.gpu.wait(Stream::Main)
    }

    fn kernel_seconds(&self) -> Vec<(String, f64)> {
        self.gpu.kernel_seconds()
    }

    fn peak_bytes(&self) -> Option<u64> {
        Some(self.gpu.peak_bytes())
    }
}

#[cfg(test)]
pub(crate) use tests::device as device_of_tests;

/// Says that a test did not run, past the harness that would swallow it.
#[cfg(test)]
fn skipped(test: &str, why: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
}
