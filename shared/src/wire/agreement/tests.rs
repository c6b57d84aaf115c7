use super::*;

/// LLaVA-1.5-7B with 1,000 pictures of 576 positions, each with 64 of text.
fn llava() -> (FederationSettings, Offer) {
    let settings = FederationSettings {
        rank: 64,
        batch_size: 16,
        rounds: 10,
        strategy: Strategy::FedAvg,
        feature_format: Format::F16,
        code_format: Format::F16,
        gradient_format: Format::F16,
        matrix_format: Format::F16,
        ..Default::default()
    };
    let offer = Offer {
        table: TableForm::F16,
        samples: 1000,
        positions: 640_000,
        image_positions: 576_000,
        pictures: 1000,
        picture_positions: 576_000,
        ..Offer::default()
    };
    (settings, offer)
}

const DIM: usize = 4096;

#[test]
fn bytes_of_llava_by_hand() {
    let (settings, offer) = llava();
    let found = Estimate::of(&settings, &offer, DIM);
    // 10.5 MB a sample: 640 positions of 8,192 bytes, both ways; 1,000 samples, 10 rounds.
    assert_eq!(found.activations, 104_857_600_000);
    let features = 576_000 * 8192; // 4.72 GB, once
    let ids = 10 * 64_000 * 3;
    let codes = 10 * 640_000 * 128 * 2;
    let matrices = 10 * 63 * 2 * 4096 * 128 * 2; // 63 steps, both adapters, both ways
    assert_eq!((features, codes, matrices), (4_718_592_000, 1_638_400_000, 1_321_205_760u64));
    assert_eq!(found.low_rank, features + ids + codes + matrices);
    assert_eq!(found.low_rank, 7_680_117_760);

    // In 8 bits: 4,098 bytes a row of features, 66 a row of codes and of matrices. 27 times less than the plain f16 split.
    let eight = Format::Int8;
    let small = FederationSettings {
        feature_format: eight,
        code_format: eight,
        gradient_format: eight,
        matrix_format: eight,
        ..settings.clone()
    };
    let found = Estimate::of(&small, &offer, DIM);
    assert_eq!(found.low_rank, 2_360_448_000 + 1_920_000 + 844_800_000 + 681_246_720);
    assert_eq!(found.activations, 10 * 640_000 * 4098 * 2);
    let agreement = Agreement::choose(&small, &offer, DIM).unwrap();
    assert_eq!((agreement.mode, agreement.features, agreement.squares()), (BoundaryMode::LowRank, eight, Format::F16));
}

#[test]
fn fisher_test_samples_and_part_time_count() {
    let (settings, offer) = llava();
    // 192 of 200 samples: 12 requests of 16, so 2 groups; the trained matrices go up once more.
    let fisher = FederationSettings { strategy: Strategy::Fisher, fisher_samples: 192, ..settings.clone() };
    let (plain, found) = (Estimate::of(&settings, &offer, DIM), Estimate::of(&fisher, &offer, DIM));
    assert_eq!(found.activations - plain.activations, 10 * 192 * 640 * 8192 * 2);
    let matrices = 2 * 4096 * 128;
    assert_eq!(found.low_rank - plain.low_rank, 10 * (192 * (64 * 3 + 640 * 128 * 2) + 3 * matrices));
    // Squares with every step of the pass.
    let found = Estimate::of(&FederationSettings { strategy: Strategy::FisherEf, ..settings.clone() }, &offer, DIM);
    assert_eq!(found.activations, plain.activations);
    assert_eq!(found.low_rank - plain.low_rank, 10 * 63 * matrices);
    // 200 samples are judged twice instead of trained on once: 50 steps, and the matrices once more.
    let found = Estimate::of(&FederationSettings { local_test: 0.2, ..settings.clone() }, &offer, DIM);
    assert_eq!(found.activations, 10 * 640 * 8192 * (800 * 2 + 400));
    let codes = 10 * 640 * 128 * (800 * 2 + 400);
    assert_eq!(found.low_rank, 576_000 * 8192 + 10 * 1200 * 64 * 3 + codes + 10 * 101 * matrices);
    // Half of the rounds: half of everything but the features.
    let found = Estimate::of(&FederationSettings { fraction: 0.5, ..settings.clone() }, &offer, DIM);
    let features = 576_000 * 8192;
    assert_eq!(
        (found.activations, found.low_rank - features),
        (plain.activations / 2, (plain.low_rank - features) / 2)
    );
    // One adapter: a tenth of the positions, half of the matrices.
    let found = Estimate::of(&FederationSettings { adapters: AdapterChoice::Text, ..settings.clone() }, &offer, DIM);
    assert_eq!(found.low_rank, features + 1_920_000 + 1_638_400_000 / 10 + 1_321_205_760 / 2);
    // So many steps whatever the samples.
    let found = Estimate::of(&FederationSettings { local_steps: 5, ..settings }, &offer, DIM);
    assert_eq!(found.activations, 10 * 80 * 640 * 8192 * 2);
}

#[test]
fn the_smaller_mode_is_chosen() {
    let (settings, offer) = llava();
    let mode = |settings: &FederationSettings, offer: &Offer| Agreement::choose(settings, offer, DIM).unwrap().mode;
    assert_eq!(mode(&settings, &offer), BoundaryMode::LowRank);
    // Short text, one sample a step: the matrices are more than what they save.
    let chat = Offer { samples: 100, positions: 2_000, ..Offer::default() };
    let alone = FederationSettings { batch_size: 1, ..settings.clone() };
    assert_eq!(mode(&alone, &chat), BoundaryMode::Activations);
    assert_eq!(mode(&settings, &chat), BoundaryMode::LowRank);
    // One picture, seen once: 4.7 MB of features and both matrices both ways against 9.5 MB of hidden states and gradients. With rank 64
    // the matrices are 2.1 MB, with 256 they are 8.4 MB.
    let seen = Offer { samples: 1, positions: 580, image_positions: 576, pictures: 1, picture_positions: 576, ..chat };
    for (rank, smaller) in [(64, BoundaryMode::LowRank), (256, BoundaryMode::Activations)] {
        let once = FederationSettings { rounds: 1, batch_size: 1, rank, ..settings.clone() };
        assert_eq!(mode(&once, &seen), smaller);
    }
    // No data at all: a connection that only asks.
    assert_eq!(mode(&settings, &Offer::default()), BoundaryMode::Activations);
    // A named mode is what it is, and so is the only one offered.
    let named = FederationSettings { boundary: BoundaryChoice::Activations, ..settings.clone() };
    assert_eq!(mode(&named, &offer), BoundaryMode::Activations);
    for only in BoundaryMode::ALL {
        assert_eq!(mode(&settings, &Offer { modes: vec![only], ..offer.clone() }), only);
    }
}

#[test]
fn what_stays_on_the_client_is_not_rounded() {
    let (settings, offer) = llava();
    let named = FederationSettings { boundary: BoundaryChoice::Activations, compress: true, ..settings };
    let agreement = Agreement::choose(&named, &offer, DIM).unwrap();
    let expected = Agreement {
        codes: Format::F16,
        gradients: Format::F16,
        deflate: true,
        overlap: Overlap::Parts,
        ..Agreement::PLAIN
    };
    assert_eq!(agreement, expected);
    assert!(!Agreement::choose(&named, &Offer { deflate: false, ..offer.clone() }, DIM).unwrap().deflate);
    let plain = FederationSettings { overlap: Overlap::Off, ..FederationSettings::exact() };
    let chosen = Agreement::choose(&plain, &Offer { modes: vec![BoundaryMode::Activations], ..offer }, DIM);
    assert_eq!(chosen, Ok(Agreement::PLAIN));
}

#[test]
fn what_is_not_offered_is_refused_with_a_remedy() {
    let (settings, offer) = llava();
    let fault = |settings: &FederationSettings, offer: &Offer| {
        let fault = Agreement::choose(settings, offer, DIM).unwrap_err();
        assert_eq!(fault.code, FaultCode::Invalid);
        fault.to_string()
    };
    let low = FederationSettings { boundary: BoundaryChoice::LowRank, ..settings.clone() };
    let old = Offer { modes: vec![BoundaryMode::Activations], ..offer.clone() };
    let words = fault(&low, &old);
    assert!(words.contains("'low-rank'") && words.contains("modes activations") && words.contains("'auto'"), "{words}");
    let words = fault(&settings, &Offer { formats: vec![Format::F32, Format::Int8], ..offer.clone() });
    assert!(words.contains("'f16'") && words.contains("f32, int8") && words.contains("feature_format"), "{words}");
    // What goes in f16 where 8 bits are too few.
    let exact = FederationSettings { feature_format: Format::F32, gradient_format: Format::F32, ..settings.clone() };
    let (plain, eight) = (Format::F32, Format::Int8);
    for (key, code_format, matrix_format) in [("code_format", eight, plain), ("matrix_format", plain, eight)] {
        let coarse = FederationSettings { code_format, matrix_format, ..exact.clone() };
        let words = fault(&coarse, &Offer { formats: vec![Format::F32, Format::Int8], ..offer.clone() });
        assert!(words.contains("'f16'") && words.contains(key), "{words}");
    }
    let words = fault(&settings, &Offer { labels: Vec::new(), ..offer.clone() });
    assert!(words.contains("'server'") && words.contains("offers no labels"), "{words}");
    let words = fault(&settings, &Offer { modes: Vec::new(), ..offer.clone() });
    assert!(words.contains("offers no modes"), "{words}");
    // However long the list is that someone sends.
    let words = fault(&low, &Offer { modes: vec![BoundaryMode::Activations; 100_000], ..offer });
    assert!(words.len() < 400, "{}", words.len());
}

#[test]
fn absurd_numbers_of_a_stranger_are_only_large() {
    let settings = FederationSettings { rounds: 100_000, local_epochs: 1000, rank: 1024, ..Default::default() };
    let most = Offer {
        samples: u32::MAX,
        positions: u64::MAX,
        image_positions: u64::MAX,
        pictures: u32::MAX,
        picture_positions: u64::MAX,
        ..Offer::default()
    };
    for samples in [0, 1, u32::MAX] {
        let found = Estimate::of(&settings, &Offer { samples, ..most.clone() }, usize::MAX);
        assert!(samples == 0 || found.activations == u64::MAX, "{found:?}");
        assert_eq!(found.low_rank, u64::MAX);
    }
}

#[test]
fn offer_and_agreement_go_through_the_handshake() {
    let (settings, offer) = llava();
    let bytes = postcard::to_stdvec(&offer).unwrap();
    assert_eq!(postcard::from_bytes::<Offer>(&bytes).unwrap(), offer);
    let agreement = Agreement::choose(&settings, &offer, DIM).unwrap();
    let bytes = postcard::to_stdvec(&agreement).unwrap();
    assert_eq!(postcard::from_bytes::<Agreement>(&bytes).unwrap(), agreement);
    // As the page reads it.
    let json = serde_json::to_value(agreement).unwrap();
    assert_eq!((&json["mode"], &json["codes"], &json["overlap"]), (&"low-rank".into(), &"f16".into(), &"parts".into()));
}

#[test]
fn coders_are_as_agreed() {
    let agreement = Agreement {
        features: Format::Int8,
        codes: Format::F16,
        rounding: Rounding::Stochastic,
        deflate: true,
        ..Agreement::PLAIN
    };
    let codes = Coder { format: Format::F16, rounding: Rounding::Stochastic, deflate: true, seed: 7 };
    assert_eq!(agreement.coder(agreement.codes, 7), codes);
    let judged = agreement.to_the_nearest();
    assert_eq!(judged.coder(judged.codes, 7), Coder { rounding: Rounding::Nearest, ..codes });
    assert_eq!(judged, Agreement { rounding: Rounding::Nearest, ..agreement });
    assert_eq!(Agreement::PLAIN.coder(Format::F32, 0), Coder::EXACT);
    assert_eq!((agreement.squares(), agreement.embeddings()), (Format::F32, Format::F16));
}

#[test]
fn squares_and_embeddings_are_never_in_eight_bits() {
    for (format, coarsest) in [(Format::F32, Format::F32), (Format::F16, Format::F16), (Format::Int8, Format::F16)] {
        let agreement = Agreement { codes: format, matrices: format, ..Agreement::PLAIN };
        assert_eq!((agreement.squares(), agreement.embeddings()), (coarsest, coarsest));
    }
}
