use super::*;
use std::io::Write;

const WIDTH: usize = 16;

fn coder(format: Format) -> Coder {
    Coder { format, ..Coder::EXACT }
}

/// Nearly normal values of some size: sums of twelve uniform ones.
fn random(rows: usize, size: f32, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = move || rng.next_u32() as f32 / 4_294_967_296.0;
    (0..rows * WIDTH).map(|_| size * ((0..12).map(|_| uniform()).sum::<f32>() - 6.0)).collect()
}

fn packed(format: Format, bytes: &[u8]) -> Packed {
    Packed { format, deflated: false, bytes: bytes.to_vec() }
}

fn deflated(format: Format, bytes: &[u8]) -> Packed {
    let mut stream = flate2::write::DeflateEncoder::new(Vec::new(), Compression::best());
    stream.write_all(bytes).unwrap();
    Packed { format, deflated: true, bytes: stream.finish().unwrap() }
}

#[test]
fn golden_bytes() {
    let exact = Coder::EXACT.pack("x", &[1.0, -0.5], 2).unwrap();
    assert_eq!(exact, packed(Format::F32, &[0, 0, 0x80, 0x3f, 0, 0, 0, 0xbf]));
    // 1 is lifted to 2^14: exponent -14. Halves 2^14, -2^13, 2^-6, 0.
    let halves = coder(Format::F16).pack("x", &[1.0, -0.5, 2f32.powi(-20), 0.0], 4).unwrap();
    assert_eq!(halves, packed(Format::F16, &[0xf2, 0, 0x74, 0, 0xf0, 0, 0x24, 0, 0]));
    // Scales 1, 0 and 1/127 as bf16, 129/128 of 2^-7; codes 127 -1, 0 0, 127 64.
    let codes = coder(Format::Int8).pack("x", &[127.0, -1.0, 0.0, 0.0, 1.0, 0.5], 2).unwrap();
    assert_eq!(codes, packed(Format::Int8, &[0x80, 0x3f, 0, 0, 0x01, 0x3c, 127, 255, 0, 0, 127, 64]));
    let step = 129.0 / 128.0 / 128.0;
    assert_eq!(codes.unpack("x", 6, 2).unwrap(), [127.0, -1.0, 0.0, 0.0, 127.0 * step, 64.0 * step]);
    assert_eq!(postcard::to_stdvec(&exact).unwrap(), [0, 0, 8, 0, 0, 0x80, 0x3f, 0, 0, 0, 0xbf]);
}

#[test]
fn bytes_by_hand() {
    assert_eq!(Format::ALL.map(|f| f.bytes(10, 64)), [2560, 1281, 660]);
    assert_eq!(Format::ALL.map(|f| f.bytes(0, 64)), [0, 1, 0]);
    assert_eq!(Format::ALL.map(|f| f.bytes(u64::MAX, u64::MAX)), [u64::MAX; 3]);
    for format in Format::ALL {
        let found = coder(format).pack("x", &random(10, 1.0, 3), WIDTH).unwrap().bytes.len();
        assert_eq!(found as u64, format.bytes(10, WIDTH as u64));
        let none = coder(format).pack("x", &[], WIDTH).unwrap();
        assert!(none.unpack("x", 0, WIDTH).unwrap().is_empty());
    }
}

#[test]
fn exact_is_exact() {
    let values = [0.0, -0.0, 1e-45, f32::MIN_POSITIVE, f32::MAX, f32::MIN, 1.0 / 3.0, -7e-20];
    for deflate in [false, true] {
        let back = Coder { deflate, ..Coder::EXACT }.pack("x", &values, 4).unwrap().unpack("x", 8, 4).unwrap();
        assert_eq!(back.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), values.map(f32::to_bits));
    }
}

#[test]
fn small_gradients_keep_their_bits() {
    for size in [1e-22, 1e-12, 1e-5, 1.0, 1e5, 1e37] {
        let mut values = random(40, size, 5);
        values[3] = size * 1e-7; // far below f16's own reach of small numbers
        let back = coder(Format::F16).pack("g", &values, WIDTH).unwrap().unpack("g", values.len(), WIDTH).unwrap();
        for (v, b) in values.iter().zip(&back).filter(|(v, _)| v.abs() > size * 1e-7 / 2.0) {
            assert!((v - b).abs() <= v.abs() * 2f32.powi(-11), "{v} came back as {b}");
        }
    }
}

#[test]
fn int8_is_off_by_half_a_step_at_most() {
    for size in [1e-30, 1e-5, 1.0, 1e37] {
        let values = random(100, size, 6);
        let back = coder(Format::Int8).pack("g", &values, WIDTH).unwrap().unpack("g", values.len(), WIDTH).unwrap();
        for (row, back) in values.chunks(WIDTH).zip(back.chunks(WIDTH)) {
            // The step is at most half a bf16 unit larger than 1/127 of the largest.
            let limit = 0.5 * largest(row) / 127.0 * (1.0 + 2f32.powi(-8)) * 1.0001;
            assert!(row.iter().zip(back).all(|(v, b)| (v - b).abs() <= limit), "{row:?} {back:?}");
        }
    }
}

/// Both ends hold the same values: what was received packs to the same bytes.
#[test]
fn packing_again_changes_nothing() {
    for format in Format::ALL {
        for deflate in [false, true] {
            let coder = Coder { deflate, ..coder(format) };
            for (seed, size) in [1e-42, 1e-37, 3e-36, 1e-30, 1e-3, 1.0, 0.999, 1.004, 1e3, 2e37].into_iter().enumerate()
            {
                for rows in [1, 7, 100] {
                    let values = random(rows, size, seed as u64);
                    let first = coder.pack("x", &values, WIDTH).unwrap();
                    let second = first.unpack("x", values.len(), WIDTH).unwrap();
                    assert_eq!(coder.pack("x", &second, WIDTH).unwrap(), first, "{format} {size} {rows}");
                }
            }
            // Largest values at all places between two powers of two, those that are rounded up to the next one included.
            for step in 0..5000u32 {
                let value = f32::from_bits(0x3f80_0000 + step * 1677);
                let values = [value, -value / 3.0, value * 1e-3, value * 1e-8];
                let first = coder.pack("x", &values, 4).unwrap();
                let second = first.unpack("x", 4, 4).unwrap();
                assert_eq!(coder.pack("x", &second, 4).unwrap(), first, "{format} {value}");
            }
        }
    }
}

#[test]
fn drawing_lots_is_right_on_average() {
    // In f16: normal numbers, and one so small beside the largest that its neighbours are 2^-24 of 2^14 apart.
    let values = [1.0f32, 0.300_01, -0.123_456, 7.3e-12, 0.0, -0.999, 2e-13, 1e-5];
    for format in [Format::F16, Format::Int8] {
        let draws = 20_000u32;
        let (mut sums, mut squares) = ([0f64; 8], [0f64; 8]);
        for seed in 0..draws {
            let coder = Coder { format, rounding: Rounding::Stochastic, deflate: false, seed: seed.into() };
            let back = coder.pack("g", &values, 8).unwrap().unpack("g", 8, 8).unwrap();
            for (i, (back, value)) in back.iter().zip(&values).enumerate() {
                let off = f64::from(*back) - f64::from(*value);
                sums[i] += off;
                squares[i] += off * off;
            }
        }
        let draws = f64::from(draws);
        for (i, value) in values.iter().enumerate() {
            // Five standard errors. With int8 the smallest are drawn so seldom that they never are.
            let seldom = if format == Format::Int8 { 1e-10 } else { 0.0 };
            let limit = 5.0 * squares[i].sqrt() / draws + seldom;
            assert!((sums[i] / draws).abs() <= limit, "{format} {value}: {} > {limit}", sums[i] / draws);
        }
        if format == Format::Int8 {
            assert!(squares[1] > 0.0, "nothing was drawn");
        }
    }
}

#[test]
fn lots_are_of_the_seed_and_the_name_and_leave_what_fits() {
    let values = random(10, 1.0, 8);
    for format in [Format::F16, Format::Int8] {
        let pack = |seed, name| {
            let coder = Coder { format, rounding: Rounding::Stochastic, deflate: false, seed };
            coder.pack(name, &values, WIDTH).unwrap()
        };
        assert_eq!(pack(1, "u"), pack(1, "u"));
        assert_ne!(pack(1, "u"), pack(2, "u"));
        assert_ne!(pack(1, "u"), pack(1, "g"));
        let fits = coder(format).pack("u", &values, WIDTH).unwrap();
        let back = fits.unpack("u", values.len(), WIDTH).unwrap();
        let coder = Coder { format, rounding: Rounding::Stochastic, deflate: false, seed: 1 };
        assert_eq!(coder.pack("u", &back, WIDTH).unwrap(), fits);
        // Never beyond the neighbours.
        let near = pack(3, "u").unpack("u", values.len(), WIDTH).unwrap();
        let step = if format == Format::F16 { 2f32.powi(-9) } else { largest(&values) / 126.0 };
        assert!(near.iter().zip(&values).all(|(n, v)| (n - v).abs() <= step), "{format}");
    }
}

#[test]
fn what_cannot_be_sent_is_named_with_a_remedy() {
    for format in Format::ALL {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let fault = coder(format).pack("codes", &[1.0, bad], 2).unwrap_err();
            assert!(matches!(fault, NumbersError::NotFinite { index: 1, .. }), "{fault}");
            let words = fault.to_string();
            assert!(words.contains("'codes'") && words.contains("learning_rate"), "{words}");
        }
        let large = coder(format).pack("codes", &[1.0, -1.71e38], 2);
        assert_eq!(large.is_ok(), format == Format::F32);
        if let Err(fault) = large {
            let words = fault.to_string();
            assert!(words.contains("index 1") && words.contains("choose f32"), "{words}");
        }
        let most = coder(format).pack("codes", &[1.7e38, -1.7e38], 2).unwrap().unpack("codes", 2, 2).unwrap();
        assert!(most.iter().all(|v| (1.68e38..1.72e38).contains(&v.abs())), "{most:?}");
        for width in [0, 2] {
            let words = coder(format).pack("codes", &[1.0; 3], width).unwrap_err().to_string();
            assert!(words.contains("no whole rows") && words.contains("one version"), "{words}");
        }
    }
}

#[test]
fn what_cannot_be_read_is_named_with_a_remedy() {
    let fault = |packed: &Packed| packed.unpack("g", 4, 2).unwrap_err().to_string();
    for format in Format::ALL {
        let good = coder(format).pack("g", &[1.0, 2.0, 3.0, 4.0], 2).unwrap();
        for change in [-1isize, 1] {
            let mut bytes = good.bytes.clone();
            bytes.resize(bytes.len().checked_add_signed(change).unwrap(), 0);
            let words = fault(&packed(format, &bytes));
            assert!(words.contains(&format!("have {}", good.bytes.len())) && words.contains("one version"), "{words}");
        }
        assert!(good.unpack("g", 4, 3).unwrap_err().to_string().contains("rows of 3"));
        // More values than any memory has, told with a few bytes.
        assert!(good.unpack("g", usize::MAX - 1, 2).is_err());
        assert!(Packed { deflated: true, ..good }.unpack("g", usize::MAX - 1, 2).is_err());
    }
    let ones = [0, 0, 0x80, 0x3f];
    assert!(fault(&packed(Format::F32, &[ones, ones, ones, [0, 0, 0xc0, 0x7f]].concat())).contains("NaN at index 3"));
    assert!(fault(&packed(Format::F16, &[0, 0, 0, 0, 0, 0, 0x7c, 0, 0])).contains("inf at index 2"));
    // 65504 * 2^113.
    assert!(fault(&packed(Format::F16, &[113, 0xff, 0x7b, 0, 0, 0, 0, 0, 0])).contains("index 0"));
    for exponent in [-101i8, 114, -128, 127] {
        assert!(fault(&packed(Format::F16, &[exponent as u8, 0, 0, 0, 0, 0, 0, 0, 0])).contains("exponent"));
    }
    // NaN, infinity, too large for 128 steps, negative.
    for scale in [[0xc0, 0x7f], [0x80, 0x7f], [0x00, 0x7c], [0x80, 0xbf]] {
        let words = fault(&packed(Format::Int8, &[0, 0, scale[0], scale[1], 1, 1, 1, 1]));
        assert!(words.contains("a scale") && words.contains("connect again"), "{words}");
    }
    // The code that nobody writes.
    let odd = packed(Format::Int8, &[0x80, 0x3f, 0, 0, 0x80, 0, 1, 1]);
    assert_eq!(odd.unpack("g", 4, 2).unwrap(), [-128.0, 0.0, 0.0, 0.0]);
}

#[test]
fn only_what_gets_smaller_is_deflated() {
    // Like features: few magnitudes, so that the upper bytes repeat.
    let smooth: Vec<f32> = (0..4096).map(|i| 1.0 + (i % 7) as f32 * 0.125).collect();
    for format in Format::ALL {
        let packed = Coder { deflate: true, ..coder(format) }.pack("x", &smooth, WIDTH).unwrap();
        let plain = coder(format).pack("x", &smooth, WIDTH).unwrap();
        assert!(packed.deflated && packed.bytes.len() * 4 < plain.bytes.len(), "{format}: {}", packed.bytes.len());
        // Later is as good as at once, and twice is once.
        assert_eq!((plain.smaller().as_ref(), packed.smaller()), (Some(&packed), None));
        let values = plain.unpack("x", 4096, WIDTH).unwrap();
        assert_eq!(packed.unpack("x", 4096, WIDTH).unwrap(), values);
        let mut there = vec![9.0; 4096];
        packed.unpack_into("x", &mut there, WIDTH).unwrap();
        assert_eq!(there, values);
        // As others may have deflated it.
        let other = deflated(format, &sorted(format, &plain.bytes));
        assert_eq!(other.unpack("x", 4096, WIDTH).unwrap(), values);
    }
    // Noise in all of a byte's values does not shrink.
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let noise: Vec<f32> = (0..4096).map(|_| f32::from(rng.next_u32() as i8)).collect();
    let packed = Coder { deflate: true, ..coder(Format::Int8) }.pack("x", &noise, 4096).unwrap();
    assert!(!packed.deflated && packed.smaller().is_none());
    // The sorted bytes of normal values do, in f32: signs and exponents repeat.
    let values = random(256, 1.0, 2);
    let packed = Coder { deflate: true, ..Coder::EXACT }.pack("x", &values, WIDTH).unwrap();
    assert!(packed.deflated && packed.unpack("x", values.len(), WIDTH).unwrap() == values);
}

#[test]
fn bombs_and_damaged_streams_are_refused() {
    for format in Format::ALL {
        // A megabyte of zeros in a thousand bytes, for four values.
        let bomb = deflated(format, &vec![0; 1 << 20]);
        assert!(bomb.bytes.len() < 2000);
        assert!(bomb.unpack("x", 4, 2).unwrap_err().to_string().contains("another length"));
        // A few bytes for very many values: refused before any memory is taken for them.
        let words = bomb.unpack("x", 1 << 40, 2).unwrap_err().to_string();
        assert!(words.contains("too short") && words.contains("one version"), "{words}");
        let values = random(20, 1.0, 4);
        let plain = coder(format).pack("x", &values, WIDTH).unwrap().bytes;
        let good = deflated(format, &sorted(format, &plain));
        let unpack = |bytes: Vec<u8>| Packed { bytes, ..good.clone() }.unpack("x", values.len(), WIDTH);
        assert!(unpack(good.bytes.clone()).is_ok());
        // One byte too few or too many inflated.
        for length in [plain.len() - 1, plain.len() + 1] {
            let mut bytes = sorted(format, &plain).into_owned();
            bytes.resize(length, 0);
            assert!(unpack(deflated(format, &bytes).bytes).is_err());
        }
        // Cut, or with something behind its end.
        for length in 0..good.bytes.len() {
            assert!(unpack(good.bytes[..length].to_vec()).is_err(), "{length}");
        }
        assert!(unpack([&good.bytes[..], &[0]].concat()).is_err());
        // Flipped bits may give other numbers, but nothing worse.
        for at in 0..good.bytes.len() {
            let mut bytes = good.bytes.clone();
            bytes[at] ^= 1 << (at % 8);
            if let Ok(back) = unpack(bytes) {
                assert!(back.len() == values.len() && back.iter().all(|v| v.is_finite()));
            }
        }
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        for length in 0..200 {
            let noise: Vec<u8> = (0..length).map(|_| rng.next_u32() as u8).collect();
            let _ = unpack(noise);
        }
    }
}

#[test]
fn packed_goes_through_the_wire_and_json() {
    for format in Format::ALL {
        let packed = Coder { deflate: true, ..coder(format) }.pack("x", &[0.5; 64], 8).unwrap();
        let bytes = postcard::to_stdvec(&packed).unwrap();
        assert_eq!(bytes.len(), packed.bytes.len() + 3);
        assert_eq!(postcard::from_bytes::<Packed>(&bytes).unwrap(), packed);
        let json = serde_json::to_string(&packed).unwrap();
        assert_eq!(serde_json::from_str::<Packed>(&json).unwrap(), packed);
    }
    // A length that the frame does not have.
    assert!(postcard::from_bytes::<Packed>(&[0, 0, 0xff, 0xff, 0xff, 0xff, 0x0f]).is_err());
}

#[test]
fn pictures_are_known_by_their_bytes() {
    // sha256sum of nothing begins with e3b0c44298fc1c14.
    let key = PictureKey::of(&packed(Format::F32, &[]));
    assert_eq!(key.to_string(), "e3b0c44298fc1c14");
    assert_ne!(PictureKey::of(&packed(Format::F32, &[0])), key);
}
